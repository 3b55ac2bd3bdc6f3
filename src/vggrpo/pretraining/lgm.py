"""Recipe of the embedded LGM: a closed-form stitch, and what can be trained from there.

Of latents that are linear in the picture, as those of the VAE's recipe are, put in the place of the picture's own
patches, a linear map by least squares leaves the geometry network nearly as accurate as it is on frames; and least
squares over noisy latents is more accurate under much noise than the network is on what the decoder draws from them.
Training (connector and LoRA against truth and teacher, on rendered and generated clips) is what the paper does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vggrpo.geometry import GeometryPrediction
from vggrpo.lgm.losses import geometry_errors, geometry_loss, unit_depth
from vggrpo.lgm.model import LatentGeometryModel, LGMConfig
from vggrpo.lgm.search import StitchFit, search_layers
from vggrpo.lgm.training import mean_errors, stitched
from vggrpo.models.pretrained import read_config, read_weights, reading
from vggrpo.models.vae import vae_hash, weights_hash
from vggrpo.models.vggt import VGGT
from vggrpo.models.wan import WanVideoModel
from vggrpo.pretraining.compress import compress_lora, widen_lora
from vggrpo.pretraining.data import CPU, Shards, at_once, augment, write_tensors
from vggrpo.pretraining.geometry import (
    CONSISTENCY_FROM,
    MATCH_WEIGHT,
    MAX_WOBBLE,
    WOBBLE_SHARE,
    reward_loss,
)
from vggrpo.pretraining.loop import Logs, Schedule, Watch, fit, half_precision
from vggrpo.pretraining.matching import Matched
from vggrpo.sampling import ode_sample
from vggrpo.world import WorldBatch, sample_prompts
from vggrpo.world.perturb import wobble

SCHEDULE = Schedule(steps=2400, lr=1e-3, ema=0.998, weight_decay=0.0, seed=3)
BATCH = 8
FRAMES, VIEW_STRIDE = 17, 4  # of a clip; RGB frames between the views of a latent
GENERATED_SHARE = 0.5
LORA_RANK, STORED_RANK = 48, 12
GENERATED_PROMPTS = 1536
# Steps and guidance of generated clips, in turn: what roll-outs, audit and evaluation will show the LGM.
SAMPLERS = ((10, 1.0), (20, 1.0), (20, 3.0))
STITCH_NOISE = 0.2  # in units of a normalised latent; what it costs on clean latents is in docs/results.md
# Latents of some batches carry noise of up to that standard deviation: the estimate of a clip while it is being sampled
# does, too.
NOISE_SHARE, MAX_NOISE = 0.35, 0.6
AUDIT_CLIPS = 96
VAE_NAME = "embedded AutoencoderKLWan, 8x8x4, 32 channels"


class EncodedClips:
    """Rendered clips as latents, encoded as they are asked for: that costs a tenth of a step, and every visit can be
    mirrored, played backwards or made to wobble."""

    def __init__(self, truth: Shards, video_model: WanVideoModel) -> None:
        self.truth, self.video_model = truth, video_model

    def __len__(self) -> int:
        return len(self.truth)

    @torch.no_grad()
    def draw(self, generator: torch.Generator, batch: int = BATCH) -> tuple[Tensor, WorldBatch, bool]:
        """A batch of latents, the truth of its views, and whether it wobbles (a share of `WOBBLE_SHARE`)."""
        index = torch.randint(len(self), (batch,), generator=generator)
        world = augment(self.truth.world(index, every=1, views=FRAMES), generator)
        wobbling = bool(torch.rand((), generator=generator) < WOBBLE_SHARE)
        if wobbling:
            amplitude = MAX_WOBBLE * torch.rand(batch, generator=generator)
            seed = int(torch.randint(2**31, (), generator=generator))
            world = wobble(world, amplitude, seed, period=VIEW_STRIDE)
        latents = noised(self.video_model.encode_video(world.video), generator)
        return latents, world.views(VIEW_STRIDE), wobbling

    @torch.no_grad()
    def batches(self, start: int, stop: int, batch: int = 16) -> Iterator[tuple[Tensor, WorldBatch]]:
        """Latents of clips start .. stop and the truth of their views."""
        for low in range(start, stop, batch):
            world = self.truth.world(torch.arange(low, min(low + batch, stop)), every=1, views=FRAMES)
            yield self.video_model.encode_video(world.video), world.views(VIEW_STRIDE)

    def pairs(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents and RGB views (B, S, 3, H, W) of clips start .. stop."""
        return ((latents, world.video.transpose(1, 2)) for latents, world in self.batches(start, stop))


def noised(latents: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of latents as it is, or with probability `NOISE_SHARE` with noise."""
    share, level = torch.rand(2, generator=generator).tolist()
    if share > NOISE_SHARE:
        return latents
    return latents + MAX_NOISE * level * torch.randn(latents.shape, generator=generator).to(latents.device)


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def stitch(teacher: VGGT, clips: EncodedClips, train: int = 768, heldout: int = 128) -> list[StitchFit]:
    """Closed-form connectors of all stitch points, best held-out R^2 first."""
    train = min(train, len(clips) * 6 // 7)
    judged = clips.pairs(train, min(train + heldout, len(clips)))
    return search_layers(teacher, clips.pairs(0, train), judged, stride=1, noise=STITCH_NOISE)


def closed_form(teacher: VGGT, clips: EncodedClips) -> LatentGeometryModel:
    """The LGM that least squares make, without a step of training."""
    fit = stitch(teacher, clips)[0]
    model = stitched(config_for(fit.layer, clips.video_model, teacher, rank=0), _copy(teacher), fit)
    return model.to(next(teacher.parameters()).device).eval()


@dataclass(frozen=True)
class LGMParts:
    """What an LGM adds to its geometry network, and where it is stitched."""

    layer: int
    tensors: dict[str, Tensor]


def parts_of(directory: Path) -> LGMParts:
    """The parts of a saved LGM."""
    with reading("latent geometry model", directory, "name a directory that `vggrpo world pretrain lgm` wrote"):
        return LGMParts(read_config(directory)["layer"], read_weights(directory))


def config_for(layer: int, video_model: WanVideoModel, teacher: VGGT, rank: int = LORA_RANK) -> LGMConfig:
    """The manifest of an LGM that reads the latents of `video_model`, stitched at `layer` of `teacher`, which will be
    beside it; with a LoRA of `rank`."""
    spec = video_model.latent_spec
    return LGMConfig(
        geometry="../geometry",
        vae=VAE_NAME,
        latent_channels=spec.channels,
        layer=layer,
        lora_rank=rank,
        lora_alpha=max(1, rank),
        spatial_stride=spec.spatial_stride,
        latents_mean=list(spec.mean),
        latents_std=list(spec.std),
        geometry_sha256=weights_hash(teacher),
        vae_sha256=vae_hash(video_model),
    )


def train_lgm(
    teacher: VGGT,
    clips: EncodedClips,
    start: StitchFit | LGMParts,
    config: LGMConfig,
    folder: Path,
    schedule: Schedule = SCHEDULE,
    generated: tuple[Tensor, Tensor] | None = None,
    bf16: bool = True,
    watch: Watch | None = None,
) -> LatentGeometryModel:
    """Train connector and LoRA on the device where teacher, clips and `generated` are.

    Args:
        start: a closed-form stitch, or an LGM to go on from (its LoRA of `config`'s rank or a lower one, of the same
            alpha / rank); its teacher may have been an earlier leg of this one.
        generated: latents (N, C, T', H', W') of the base generator and their RGB views (N, S, 3, H, W); the teacher
            judges the views, once. A share of `GENERATED_SHARE` of all batches. None: rendered clips alone.
    """
    device, batch = next(teacher.parameters()).device, BATCH * schedule.batch_scale
    torch.manual_seed(schedule.seed)
    student = LatentGeometryModel(config, _copy(teacher))
    student.add_lora()
    if isinstance(start, StitchFit):
        start.load_into(student.connector)
        student.special.copy_(start.special)
    else:
        student.load_state_dict_parts(widen_lora(start.tensors, student.parts()))
    judged = None if generated is None else teacher_targets(teacher, generated[1])
    through_convs = config.layer < teacher.encoder_layers  # what matching is read from

    def loss(model: nn.ModuleList, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        if generated is not None and judged is not None and torch.rand((), generator=generator) < GENERATED_SHARE:
            index = torch.randint(len(generated[0]), (batch,), generator=generator)
            target = judged.index(index).to(dtype=torch.float32)
            with half_precision(device, bf16):
                prediction, raw = model[0].predict(noised(generated[0][index].float(), generator))
            # On them the teacher's word counts for what the rewards make of it, too: left to itself an LGM finds what
            # it cannot see clearly consistent.
            consistency = step >= CONSISTENCY_FROM * schedule.steps
            return geometry_loss(prediction, raw, target)[0] + reward_loss(prediction, target, consistency=consistency)[
                0
            ], {}
        latents, world, wobbling = clips.draw(generator, batch)
        target = unit_depth(world.geometry(every=1))
        with half_precision(device, bf16):
            prediction, raw = model[0].predict(latents)
            # The displacements of a wobbling world are not those of its picture.
            match = model[1].loss(world) if through_convs and not wobbling else torch.zeros((), device=device)
        value, logs = geometry_loss(prediction, raw, target)
        extra, more = reward_loss(prediction, target, consistency=step >= CONSISTENCY_FROM * schedule.steps)
        value = value + MATCH_WEIGHT * match + extra
        return value, more if wobbling else logs | more | {"match": match.detach()}

    return fit(nn.ModuleList([student, Matched(student.geometry)]).to(device), loss, schedule, folder, watch)[0]


@torch.no_grad()
def teacher_targets(teacher: VGGT, views: Tensor, batch: int = 16) -> GeometryPrediction:
    """The teacher's word on RGB views (N, S, 3, H, W), as `geometry_loss` wants it; kept in half precision."""
    parts = [unit_depth(teacher(part.float())).to(dtype=torch.float16) for part in views.split(batch)]
    return GeometryPrediction.cat(parts)


@torch.no_grad()
def compressed(model: LatentGeometryModel, teacher: VGGT, rank: int = STORED_RANK) -> LatentGeometryModel:
    """The trained LGM with a LoRA of `rank`, a quarter of its size."""
    config = model.config.model_copy(update={"lora_rank": rank, "lora_alpha": rank})
    small = LatentGeometryModel(config, _copy(teacher))
    small.add_lora()
    small.load_state_dict_parts(compress_lora(model.parts(), rank))
    return small.to(next(teacher.parameters()).device).eval()


def _copy(teacher: VGGT) -> VGGT:
    copy = VGGT(teacher.config)
    copy.load_state_dict(teacher.state_dict())
    return copy


@torch.no_grad()
def measure_lgm(
    lgm: LatentGeometryModel, teacher: VGGT, clips: EncodedClips, count: int = 256
) -> dict[str, dict[str, float]]:
    """Held-out errors of LGM and RGB model on the same rendered clips."""
    rows: dict[str, list[dict[str, Tensor]]] = {"lgm": [], "rgb": []}
    for latents, world in clips.batches(0, min(count, len(clips))):
        target = world.geometry(every=1)
        rows["lgm"].append(geometry_errors(lgm(latents), target))
        rows["rgb"].append(geometry_errors(teacher(world.video.transpose(1, 2)), target))
    return {name: mean_errors(errors) for name, errors in rows.items()}


@torch.no_grad()
def generated_clips(
    pipeline: Path, cache: Path, prompts: int | None = None, device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """Clips of the base generator by all `SAMPLERS`: latents (N, C, T', H', W'), RGB views (N, S, 3, H, W), float16,
    made and given on `device`.

    Kept: `cache` is the file they are read from the next time.
    """
    if not cache.exists():
        model = WanVideoModel.from_pretrained(pipeline, device)
        prompts = prompts or GENERATED_PROMPTS
        shape = model.latent_spec.latent_shape(17, 64, 64)
        texts, empty = sample_prompts(prompts, seed=5), model.encode_prompt([""])
        batch = at_once(device, 16, 128)
        latents, views = [], []
        for number, low in enumerate(range(0, prompts, batch)):
            text = model.encode_prompt(texts[low : low + batch])
            steps, guidance = SAMPLERS[number % len(SAMPLERS)]
            latents.append(
                ode_sample(
                    model,
                    text,
                    shape=shape,
                    seeds=list(range(low, low + len(text))),
                    num_steps=steps,
                    guidance_scale=guidance,
                    negative_text=empty,
                )
            )
            views.append(model.decode(latents[-1])[:, :, ::4].transpose(1, 2).half())
        write_tensors(cache, {"latents": torch.cat(latents).half().cpu(), "views": torch.cat(views).cpu().contiguous()})
    return _read(cache, "latents").to(device), _read(cache, "views").to(device)
