"""`vggrpo train-lgm`: cache -> search -> distillation -> an LGM directory, for any VAE and any geometry model.

    OUTPUT/cache        latents, views and the teacher's geometry      (vggrpo.lgm.cache)
    OUTPUT/stitch.safetensors, search.json, search.html                (vggrpo.lgm.search, .ranking)
    OUTPUT/checkpoints, log.jsonl                                      (vggrpo.lgm.training)
    OUTPUT/lgm          the finished model, with its held-out errors in card.json

Every stage goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vggrpo.checkpoint import load_latest
from vggrpo.config import EMBEDDED
from vggrpo.config_lgm import TrainLGMConfig, check_resumable, dump_lgm_config
from vggrpo.distributed import Processes
from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write, atomic_write_json, ensure_directory
from vggrpo.lgm.cache import CachedClips, CacheSettings, build_cache
from vggrpo.lgm.clips import Clip, Source, video_sources
from vggrpo.lgm.connector import at_view_rate
from vggrpo.lgm.model import LGMConfig, geometry_licence
from vggrpo.lgm.ranking import rank_downstream, write_search
from vggrpo.lgm.search import Pair, StitchFit, load_fit, save_fit, search_layers
from vggrpo.lgm.training import Material, distill, stitched
from vggrpo.models.base import GeometryModel, LatentSpec
from vggrpo.models.loading import load_geometry_model, load_video_model, pick_device
from vggrpo.models.vae import VAE, ImageVAE, weights_hash
from vggrpo.models.wan import WanVideoModel
from vggrpo.posttraining.micro_batch import is_out_of_memory

logger = logging.getLogger(__name__)


def train_lgm(config: TrainLGMConfig, *, search_only: bool = False, progress: bool = True) -> Path:
    """Make a Latent Geometry Model.

    Args:
        search_only: stop after the layer search.

    Returns:
        OUTPUT/lgm, or with `search_only` OUTPUT/search.json.

    Raises:
        UserError: bad input; nothing of an earlier run is overwritten.
    """
    processes = Processes.join()
    output = ensure_directory(config.output)
    checkpoint = load_latest(output / "checkpoints")
    if checkpoint is not None:
        check_resumable(checkpoint.state["config"], config)
    parts = _Parts.load(config, processes)
    material = make_cache(config, parts, processes)
    parts = parts.without_makers()
    if parts.device.type == "cuda":
        torch.cuda.empty_cache()
    if processes.is_main:
        atomic_write(output / "config.yaml", dump_lgm_config(config))
    base = _lgm_config(config, parts, material)
    fit = find_stitch(config, parts, material, base, processes)
    if search_only:
        return output / "search.json"
    # The teacher's word is in the cache, so the LGM may have its layers: no second copy of them in memory.
    model = stitched(base.model_copy(update={"layer": fit.layer}), parts.teacher, fit)
    torch.manual_seed(config.seed)
    model.add_lora()
    with _advice():
        errors = distill(config, model, material, processes=processes, progress=progress)
    if processes.is_main:
        model.save_pretrained(output / "lgm")
        card = {
            "heldout_errors_against_teacher": errors,
            "updates": config.updates,
            "clips": len(material.train),
            "trained_on": config.clips.model_dump(mode="json"),
            "geometry_licence": geometry_licence(output / "lgm"),
        }
        atomic_write_json(output / "lgm" / "card.json", card)
    processes.barrier()
    return output / "lgm"


@contextmanager
def _advice() -> Iterator[None]:
    """Out of memory is the user's to mend: say with what."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: set distill.micro_batch: 1 and distill.gradient_checkpointing: true, and run again to go "
            "on; `vggrpo doctor` estimates what a recipe needs"
        ) from error


@dataclass(frozen=True)
class _Parts:
    """The loaded models.

    Attributes:
        vae, generator: what makes the cache, the latter where it can make clips; None once that is done.
        spec: shape arithmetic of the VAE.
        geometry_path: what the LGM's manifest names: an absolute path, a hub id or "embedded".
    """

    vae: VAE | None
    spec: LatentSpec
    teacher: GeometryModel
    generator: WanVideoModel | None
    geometry_path: str
    device: torch.device

    @classmethod
    def load(cls, config: TrainLGMConfig, processes: Processes) -> _Parts:
        device = pick_device(config.video.device, processes.local_rank)
        vae: VAE
        if config.video.kind == "image":
            vae, generator = ImageVAE.from_pretrained(config.video.path, device), None
        else:
            generator = load_video_model(
                config.video.path,
                device=config.video.device,
                dtype=config.video.dtype,
                local_rank=processes.local_rank,
                load_text=config.clips.generated_share > 0,
            )
            vae = generator
        vae.latent_spec.latent_shape(config.clips.num_frames, config.clips.height, config.clips.width)
        path = config.geometry.path
        teacher = load_geometry_model(path).to(device)  # type: ignore[attr-defined]
        named = str(Path(path).resolve()) if Path(path).exists() else path
        return cls(vae, vae.latent_spec, teacher, generator, named, device)

    def without_makers(self) -> _Parts:
        """VAE, transformer and text encoder forgotten: search and distillation read the cache."""
        return replace(self, vae=None, generator=None)


def make_cache(config: TrainLGMConfig, parts: _Parts, processes: Processes) -> Material:
    """Fill the cache and split its clips."""
    assert parts.vae is not None
    clips, spec = config.clips, parts.spec
    stride = spec.temporal_stride if config.stitch.view_rate == "latent" else 1
    identity = {
        "VAE": weights_hash(getattr(parts.vae, "vae", parts.vae)),  # a video model holds its VAE, an image VAE is one
        "latent normalisation": [list(spec.mean), list(spec.std)],
        "teacher": weights_hash(parts.teacher),  # type: ignore[arg-type]
        "clips.videos": clips.videos,  # clips are known by their names in there
        "generator": [config.video.path, clips.prompts, clips.generated_steps, clips.guidance_scale],
        "clip size": [clips.num_frames, clips.height, clips.width],
        "frame_stride": clips.frame_stride,
        "view_rate": config.stitch.view_rate,
    }
    settings = CacheSettings(identity, stride, clips.shard_size, clips.micro_batch)
    folder = config.cache_directory
    common = (folder, parts.vae, parts.teacher, settings)
    build_cache(common[0], _real_sources(config), *common[1:], max_clips=clips.max_clips, processes=processes)
    real = CachedClips(folder).kinds.count("real")
    if not real:
        raise UserError(f"no clip of {clips.videos} could be used; the warnings above say why")
    count = round(real * clips.generated_share / (1 - clips.generated_share))
    if count and parts.generator is not None:
        sources = _generated_sources(config, parts.generator, count)
        build_cache(common[0], sources, *common[1:], max_clips=count, processes=processes)
    cached = CachedClips(folder)
    train, heldout = cached.split(clips.heldout_share)
    return Material(cached, train, heldout, stride)


def find_stitch(
    config: TrainLGMConfig, parts: _Parts, material: Material, base: LGMConfig, processes: Processes
) -> StitchFit:
    """Search the layers, rank them, keep the best one's connector in OUTPUT; the main process does it for all."""
    output, stitch = Path(config.output), config.stitch
    kept = output / "stitch.safetensors"
    if processes.is_main and not kept.is_file():
        batch = config.clips.micro_batch

        def pairs(index: list[int]) -> Iterator[Pair]:
            for latents, views in material.clips.pairs(index, batch, parts.device):
                yield at_view_rate(latents, base.view_rate, base.temporal_stride), views

        layers = stitch.layers if stitch.layer is None else [stitch.layer]
        unsafe = sorted(set(layers or ()) - set(parts.teacher.stitch_points()))
        if unsafe:
            raise UserError(
                f"stitch.layers {unsafe} are not safe for this model's heads; take from {parts.teacher.stitch_points()}"
            )
        train, heldout = list(material.train)[: stitch.max_clips], list(material.heldout)
        fits = search_layers(parts.teacher, pairs(train), pairs(heldout), base.stride, layers, stitch.ridge)
        ranked = rank_downstream(
            fits,
            lambda fit: stitched(base.model_copy(update={"layer": fit.layer}), parts.teacher, fit),
            lambda: material.clips.pairs(heldout, batch, parts.device),
            stitch.rank_by,
        )
        write_search(output, ranked, ranked[0].fit.layer, stitch.rank_by)
        save_fit(kept, ranked[0].fit)
    processes.barrier()
    return load_fit(kept)


def _lgm_config(config: TrainLGMConfig, parts: _Parts, material: Material) -> LGMConfig:
    """The manifest, but for the layer."""
    spec = parts.spec
    latents, views = next(material.clips.pairs(material.train[:1], 1, parts.device))
    return LGMConfig(
        geometry=parts.geometry_path,
        backend=parts.teacher.model_type,
        vae=config.video.path if config.video.path != EMBEDDED else "embedded",
        latent_channels=spec.channels,
        temporal_stride=spec.temporal_stride,
        stride=connector_stride(parts.teacher, latents, views),
        view_rate=config.stitch.view_rate,
        lora_rank=config.distill.lora_rank,
        lora_alpha=config.distill.lora_alpha,
        spatial_stride=spec.spatial_stride,
        latents_mean=list(spec.mean) or None,
        latents_std=list(spec.std) or None,
    )


@torch.no_grad()
def connector_stride(teacher: GeometryModel, latents: Tensor, views: Tensor) -> int:
    """Latent cells a token, per direction: 2 for a VAE that compresses by 8 and tokens of 16 pixels.

    Args:
        latents: (1, C, T', H', W').
        views: (1, S, 3, h, w) of the same clip.

    Raises:
        UserError: cells and tokens do not divide.
    """
    layer = teacher.stitch_points()[0]
    tokens = teacher.tap(views[:, :1], layer).shape[2] - teacher.special_tokens(layer).shape[1]
    cells = latents.shape[-2] * latents.shape[-1]
    stride = round((cells / tokens) ** 0.5)
    if stride < 1 or stride * stride * tokens != cells:
        raise UserError(
            f"{latents.shape[-2]}x{latents.shape[-1]} latent cells do not divide into the {tokens} tokens that the "
            "geometry model makes of a frame; set clips.height and clips.width to multiples of 16"
        )
    return stride


def _real_sources(config: TrainLGMConfig) -> Iterator[Source]:
    clips, size = config.clips, (config.clips.height, config.clips.width)
    if clips.videos != EMBEDDED:
        return video_sources(
            clips.videos,
            num_frames=clips.num_frames,
            size=size,
            frame_stride=clips.frame_stride,
            min_kept=clips.min_kept,
            clips_per_video=clips.clips_per_video,
        )
    return (Source(f"world/{i}", lambda i=i: _rendered(i, clips.num_frames, size)) for i in range(clips.max_clips))  # type: ignore[misc]


def _rendered(seed: int, num_frames: int, size: tuple[int, int]) -> Iterator[Clip]:
    from vggrpo.world import sample_batch

    video = sample_batch([seed], num_frames=num_frames, size=size, split="train").video[0]
    yield Clip(f"world/{seed}#0", (video * 255).round().to(torch.uint8))


def _generated_sources(config: TrainLGMConfig, model: WanVideoModel, count: int) -> Iterator[Source]:
    """One source a prompt and seed; prompts repeat with new seeds when there are fewer than clips."""
    if config.clips.prompts == EMBEDDED:
        from vggrpo.world import sample_prompts

        prompts = sample_prompts(count, config.seed, split="train")
    else:
        from vggrpo.io.prompts import read_prompts

        prompts = read_prompts(config.clips.prompts)
    for i in range(count):
        prompt = prompts[i % len(prompts)]
        yield Source(f"generated/{i}/{prompt}", lambda i=i, prompt=prompt: _generated(config, model, prompt, i))  # type: ignore[misc]


@torch.no_grad()
def _generated(config: TrainLGMConfig, model: WanVideoModel, prompt: str, number: int) -> Iterator[Clip]:
    from vggrpo.sampling import derive_seed, ode_sample

    clips = config.clips
    guided: dict[str, Any] = {}
    if clips.guidance_scale > 1:
        guided = {"guidance_scale": clips.guidance_scale, "negative_text": model.encode_prompt([""])}
    latents = ode_sample(
        model,
        model.encode_prompt([prompt]),
        shape=model.latent_spec.latent_shape(clips.num_frames, clips.height, clips.width),
        seeds=[derive_seed(config.seed, "lgm clips", number)],
        num_steps=clips.generated_steps,
        **guided,
    )
    yield Clip(f"generated/{number}/{prompt}#0", latents=latents[0].cpu(), kind="generated")
