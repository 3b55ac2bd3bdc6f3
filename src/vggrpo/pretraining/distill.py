"""`vggrpo train-lgm`: cache -> search -> distillation -> an LGM directory, for any VAE and any geometry model.

    OUTPUT/cache        latents, views and the teacher's geometry      (vggrpo.lgm.cache)
    OUTPUT/stitch.safetensors, search.json, search.html                (vggrpo.lgm.search, .ranking)
    OUTPUT/checkpoints, log.jsonl                                      (vggrpo.lgm.training)
    OUTPUT/lgm          the finished model, with its held-out errors in card.json

Every stage goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vggrpo.checkpoint import load_latest
from vggrpo.config import EMBEDDED
from vggrpo.config_lgm import TrainLGMConfig, check_resumable, dump_lgm_config
from vggrpo.distributed import Processes
from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write, atomic_write_json, ensure_directory, without_nan
from vggrpo.lgm.cache import CachedClips, CacheSettings, build_cache
from vggrpo.lgm.clips import Clip, Source, video_sources
from vggrpo.lgm.connector import at_view_rate
from vggrpo.lgm.model import LGMConfig, geometry_licence
from vggrpo.lgm.ranking import rank_downstream, write_search
from vggrpo.lgm.search import Pair, StitchFit, load_fit, save_fit, search_layers
from vggrpo.lgm.training import Material, check_batch, distill, stitched
from vggrpo.models.base import GeometryModel, LatentSpec
from vggrpo.models.loading import load_geometry_model, load_video_model, pick_device
from vggrpo.models.vae import VAE, ImageVAE, vae_hash, weights_hash
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
    check_inputs(config, parts, processes)
    # One process may work for hours alone: it has the longer videos, or searches the layers for all.
    patient = processes.patient()
    material = make_cache(config, parts, patient)
    parts = parts.without_makers()
    if parts.device.type == "cuda":
        torch.cuda.empty_cache()
    if processes.is_main:
        atomic_write(output / "config.yaml", dump_lgm_config(config))
    base = _lgm_config(config, parts)
    fit = find_stitch(config, parts, material, base, patient, trained=checkpoint is not None)
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
            "heldout_errors_against_teacher": without_nan(errors),  # nothing moves in a few clips: no error of masks
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
        hashes: of the weights ("VAE", "teacher") that latents, views' geometry and layer search depend on.
    """

    vae: VAE | None
    spec: LatentSpec
    teacher: GeometryModel
    generator: WanVideoModel | None
    geometry_path: str
    device: torch.device
    hashes: dict[str, str]

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
        hashes = {"VAE": vae_hash(vae), "teacher": weights_hash(teacher)}  # type: ignore[arg-type]
        return cls(vae, vae.latent_spec, teacher, generator, named, device, hashes)

    def without_makers(self) -> _Parts:
        """VAE, transformer and text encoder forgotten: search and distillation read the cache."""
        return replace(self, vae=None, generator=None)


def check_inputs(config: TrainLGMConfig, parts: _Parts, processes: Processes) -> None:
    """Refuse now what the stages after the cache would refuse: the cache takes hours.

    Raises:
        UserError: layers that are not safe, a batch that processes cannot share, latent cells that do not divide into
            tokens, or no prompts for the generated clips.
    """
    check_layers(config, parts.teacher)
    check_batch(config.distill.batch, processes.size)
    connector_stride(parts.teacher, parts.spec, (config.clips.height, config.clips.width))
    if config.clips.generated_share > 0:
        _prompts(config, 1)


def make_cache(config: TrainLGMConfig, parts: _Parts, processes: Processes) -> Material:
    """Fill the cache, and choose and split this run's clips: the cache may hold more, of other runs."""
    vae, clips, spec = parts.vae, config.clips, parts.spec
    assert vae is not None
    stride = spec.temporal_stride if config.stitch.view_rate == "latent" else 1
    identity = {
        **parts.hashes,
        "latent normalisation": [list(spec.mean), list(spec.std)],
        "clips.videos": clips.videos,  # clips are known by their names in there
        "generator": [config.video.path, clips.prompts, clips.generated_steps, clips.guidance_scale],
        "clips.clips_per_video": clips.clips_per_video,  # a finished video is not opened again for more
        "clip size": [clips.num_frames, clips.height, clips.width],
        "frame_stride": clips.frame_stride,
        "view_rate": config.stitch.view_rate,
    }
    settings = CacheSettings(identity, stride, clips.shard_size, clips.micro_batch)
    folder = config.cache_directory

    def cached(sources: Callable[[], Iterator[Source]], count: int) -> list[str]:
        """Keys of the first `count` clips of the sources; those that the cache lacks are made."""
        build_cache(folder, sources(), vae, parts.teacher, settings, max_clips=count, processes=processes)
        return CachedClips(folder).first_of((source.name for source in sources()), count)

    keys = cached(lambda: _real_sources(config), clips.max_clips)
    if not keys:
        raise UserError(f"no clip of {clips.videos} could be used; the warnings above say why")
    count = round(len(keys) * clips.generated_share / (1 - clips.generated_share))
    generator = parts.generator
    if count and generator is not None:
        keys += cached(lambda: _generated_sources(config, generator, count), count)
    everything = CachedClips(folder)
    return Material(everything, *everything.split(clips.heldout_share, keys), stride)


def check_layers(config: TrainLGMConfig, teacher: GeometryModel) -> None:
    """Refuse layers after which the heads would miss tokens.

    Raises:
        UserError: names them, and those to take.
    """
    unsafe = sorted(set(_wanted_layers(config) or ()) - set(teacher.stitch_points()))
    if unsafe:
        field = "layers" if config.stitch.layer is None else "layer"
        raise UserError(
            f"stitch.{field} {unsafe}: not safe for this model's heads; take from {teacher.stitch_points()}"
        )


def _wanted_layers(config: TrainLGMConfig) -> list[int] | None:
    """Layers that the search fits; None: all that are safe."""
    return config.stitch.layers if config.stitch.layer is None else [config.stitch.layer]


def find_stitch(
    config: TrainLGMConfig, parts: _Parts, material: Material, base: LGMConfig, processes: Processes, *, trained: bool
) -> StitchFit:
    """The best layer's connector: an earlier search's in OUTPUT if it was the same one, or a new search's.

    The main process searches for all.

    Args:
        trained: checkpoints that started from the earlier search are there.

    Raises:
        UserError: another search is asked for than the checkpoints started from.
    """
    kept = Path(config.output) / "stitch.safetensors"
    if processes.is_main:
        train = list(material.train)[: config.stitch.max_clips]
        heldout = list(material.heldout)[: config.stitch.max_heldout]
        origin = _search_origin(config, parts, [material.clips.keys[i] for i in (*train, *heldout)])
        earlier = load_fit(kept).origin if kept.is_file() else None
        if earlier not in (None, origin) and trained:
            raise UserError(
                f"the checkpoints in {config.output} started from a layer search with other clips, weights or stitch.* "
                f"than now; set another output=DIR, or delete {config.output}/checkpoints to train anew"
            )
        if earlier != origin:
            save_fit(kept, replace(_search(config, parts, material, base, train, heldout), origin=origin))
    processes.barrier()
    return load_fit(kept)


def _search_origin(config: TrainLGMConfig, parts: _Parts, keys: list[str]) -> str:
    """Digest of all that the layer search depends on: settings, weights, and the clips by their keys."""
    inputs = {"stitch": config.stitch.model_dump(mode="json"), "clips": keys, **parts.hashes}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _search(
    config: TrainLGMConfig, parts: _Parts, material: Material, base: LGMConfig, train: list[int], heldout: list[int]
) -> StitchFit:
    """Fit every wanted layer, rank them, write what came out to OUTPUT; returns the best."""
    stitch, batch = config.stitch, config.clips.micro_batch

    def pairs(index: list[int]) -> Iterator[Pair]:
        for latents, views in material.clips.pairs(index, batch, parts.device):
            yield at_view_rate(latents, base.view_rate, base.temporal_stride), views

    layers = _wanted_layers(config)
    fits = search_layers(parts.teacher, pairs(train), pairs(heldout), base.stride, layers, stitch.ridge, stitch.noise)
    ranked = rank_downstream(
        fits,
        lambda fit: stitched(base.model_copy(update={"layer": fit.layer}), parts.teacher, fit),
        material.clips.targets(heldout, batch, material.view_stride, parts.device),
        stitch.rank_by,
    )
    write_search(Path(config.output), ranked, ranked[0].fit.layer, stitch.rank_by)
    return ranked[0].fit


def _lgm_config(config: TrainLGMConfig, parts: _Parts) -> LGMConfig:
    """The manifest, but for the layer."""
    spec = parts.spec
    return LGMConfig(
        geometry=parts.geometry_path,
        backend=parts.teacher.model_type,
        vae=config.video.path if config.video.path != EMBEDDED else "embedded",
        latent_channels=spec.channels,
        temporal_stride=spec.temporal_stride,
        stride=connector_stride(parts.teacher, spec, (config.clips.height, config.clips.width)),
        view_rate=config.stitch.view_rate,
        lora_rank=config.distill.lora_rank,
        lora_alpha=config.distill.lora_alpha,
        spatial_stride=spec.spatial_stride,
        latents_mean=list(spec.mean) or None,
        latents_std=list(spec.std) or None,
        geometry_sha256=parts.hashes["teacher"],
        vae_sha256=parts.hashes["VAE"],
    )


@torch.no_grad()
def connector_stride(teacher: GeometryModel, spec: LatentSpec, size: tuple[int, int]) -> int:
    """Latent cells a token, per direction: 2 for a VAE that compresses by 8 and tokens of 16 pixels.

    Args:
        size: pixels of the videos, (height, width).

    Raises:
        UserError: cells and tokens do not divide.
    """
    *_, rows, columns = spec.latent_shape(1, *size)
    layer = teacher.stitch_points()[0]
    device = next(teacher.parameters()).device  # type: ignore[attr-defined]
    frame = torch.zeros(1, 1, 3, *teacher.image_size_for(size), device=device)
    tokens = teacher.tap(frame, layer).shape[2] - teacher.special_tokens(layer).shape[1]
    stride = round((rows * columns / tokens) ** 0.5)
    if stride < 1 or stride * stride * tokens != rows * columns:
        raise UserError(
            f"{rows}x{columns} latent cells do not divide into the {tokens} tokens that the "
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
    prompts = _prompts(config, count)
    for i in range(count):
        prompt = prompts[i % len(prompts)]
        name = f"generated/{config.seed}/{i}/{prompt}"  # with the seed: runs of several seeds may share a cache
        yield Source(name, lambda i=i, prompt=prompt, name=name: _generated(config, model, prompt, i, name))  # type: ignore[misc]


def _prompts(config: TrainLGMConfig, count: int) -> list[str]:
    """Prompts of `count` generated clips; those of a file are all that it has."""
    if config.clips.prompts == EMBEDDED:
        from vggrpo.world import sample_prompts

        return sample_prompts(count, config.seed, split="train")
    from vggrpo.io.prompts import read_prompts

    return read_prompts(config.clips.prompts)


@torch.no_grad()
def _generated(config: TrainLGMConfig, model: WanVideoModel, prompt: str, number: int, name: str) -> Iterator[Clip]:
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
    yield Clip(f"{name}#0", latents=latents[0].cpu(), kind="generated")
