"""Recipe of the embedded LGM: closed-form stitch, then connector + LoRA against truth and teacher.

Trained on rendered and generated clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vggrpo.geometry import GeometryPrediction
from vggrpo.lgm.losses import geometry_errors, geometry_loss, unit_depth
from vggrpo.lgm.model import LatentGeometryModel, LGMConfig
from vggrpo.lgm.search import StitchFit, search_layers
from vggrpo.lgm.training import mean_errors
from vggrpo.models.vggt import VGGT
from vggrpo.models.wan import WanVideoModel
from vggrpo.pretraining.compress import compress_lora
from vggrpo.pretraining.data import Shards, mirror
from vggrpo.pretraining.geometry import (
    CONSISTENCY_FROM,
    CONSISTENCY_WEIGHT,
    MATCH_WEIGHT,
    MAX_WOBBLE,
    WOBBLE_SHARE,
    consistency_error,
)
from vggrpo.pretraining.loop import Schedule, fit
from vggrpo.pretraining.matching import Matched
from vggrpo.sampling import ode_sample
from vggrpo.world import WorldBatch, sample_prompts
from vggrpo.world.perturb import wobble

SCHEDULE = Schedule(steps=2400, lr=1e-3, ema=0.998, weight_decay=0.0, seed=3)
BATCH = 8
GENERATED_SHARE = 0.25
LORA_RANK, SHIPPED_RANK = 48, 12
GENERATED_PROMPTS = 384
AUDIT_CLIPS = 96
VAE_NAME = "embedded AutoencoderKLWan, 8x8x4, 16 channels"


class LatentClips:
    """Clips as latents with a target geometry: the renderer's truth, or the teacher's word on generated clips."""

    def __init__(self, latents: list[Path], shards: list[Path]) -> None:
        self.truth = Shards.load(shards)
        self.latents = torch.cat([_read(path, "latents") for path in latents])
        self.mirrored = torch.cat([_read(path, "mirrored") for path in latents])

    def draw(self, generator: torch.Generator) -> tuple[Tensor, WorldBatch]:
        """A batch of latents with their worlds, mirrored with probability one half."""
        index = torch.randint(len(self), (BATCH,), generator=generator)
        world = self.truth.world(index)
        if torch.rand((), generator=generator) < 0.5:
            return self.mirrored[index].float(), mirror(world)
        return self.latents[index].float(), world

    def __len__(self) -> int:
        return len(self.latents)

    def pairs(self, start: int, stop: int, batch: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents and RGB views (B, S, 3, H, W) of clips start .. stop."""
        for low in range(start, stop, batch):
            index = torch.arange(low, min(low + batch, stop))
            yield self.latents[index].float(), self.truth.world(index).video.transpose(1, 2)


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def stitch(teacher: VGGT, clips: LatentClips, train: int = 768, heldout: int = 128) -> list[StitchFit]:
    """Closed-form connectors of all stitch points, best held-out R^2 first."""
    train = min(train, len(clips) * 6 // 7)
    return search_layers(teacher, clips.pairs(0, train), clips.pairs(train, min(train + heldout, len(clips))), stride=1)


def train_lgm(
    teacher: VGGT,
    clips: LatentClips,
    fitted: StitchFit,
    config: LGMConfig,
    folder: Path,
    schedule: Schedule = SCHEDULE,
    generated: tuple[Tensor, Tensor] | None = None,
    video_model: WanVideoModel | None = None,
    bf16: bool = True,
) -> LatentGeometryModel:
    """Train connector and LoRA.

    Args:
        generated: latents (N, C, T', H', W') of the base generator and their RGB views (N, S, 3, H, W); the teacher
            judges the views. A share of `GENERATED_SHARE` of all batches. None: rendered clips alone.
        video_model: encodes wobbling clips, a share of `WOBBLE_SHARE`. None: no such clips.
    """
    torch.manual_seed(schedule.seed)
    student = LatentGeometryModel(config, _copy(teacher))
    fitted.load_into(student.connector)
    student.special.copy_(fitted.special)
    student.add_lora()
    through_convs = config.layer < teacher.config.conv_layers  # what matching is read from

    def loss(model: nn.ModuleList, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        draw = torch.rand((), generator=generator).item()
        world = None
        if generated is not None and draw < GENERATED_SHARE:
            index = torch.randint(len(generated[0]), (BATCH,), generator=generator)
            latents = generated[0][index].float()
            with torch.no_grad():
                target = unit_depth(teacher(generated[1][index].float()))
        elif video_model is not None and draw > 1 - WOBBLE_SHARE:
            latents, target = wobbling_clips(clips.truth, video_model, generator)
        else:
            latents, world = clips.draw(generator)
            target = unit_depth(world.geometry(every=1))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction, raw = model[0].predict(latents)
            match = model[1].loss(world) if world is not None and through_convs else torch.zeros(())
        value, logs = geometry_loss(prediction, raw, target)
        if world is None:
            return value, {}
        value, logs = value + MATCH_WEIGHT * match, logs | {"match": match.item()}
        if step < CONSISTENCY_FROM * schedule.steps:
            return value, logs
        error = consistency_error(prediction)
        return value + CONSISTENCY_WEIGHT * error, logs | {"e_geo": error.item()}

    return fit(nn.ModuleList([student, Matched(student.geometry)]), loss, schedule, folder)[0]


@torch.no_grad()
def compressed(model: LatentGeometryModel, teacher: VGGT, rank: int = SHIPPED_RANK) -> LatentGeometryModel:
    """The trained LGM with a LoRA of `rank`, a quarter of its size."""
    config = model.config.model_copy(update={"lora_rank": rank, "lora_alpha": rank})
    small = LatentGeometryModel(config, _copy(teacher))
    small.add_lora()
    small.load_state_dict_parts(compress_lora(model.parts(), rank))
    return small.eval()


@torch.no_grad()
def wobbling_clips(
    truth: Shards, video_model: WanVideoModel, generator: torch.Generator
) -> tuple[Tensor, GeometryPrediction]:
    """Latents and geometry of a batch of rendered clips with a wobble of up to `MAX_WOBBLE` pixels."""
    index = torch.randint(len(truth), (BATCH,), generator=generator)
    amplitude = MAX_WOBBLE * torch.rand(BATCH, generator=generator)
    seed = int(torch.randint(2**31, (), generator=generator))
    world = wobble(truth.world(index, every=1, views=17), amplitude, seed)
    return video_model.encode_video(world.video), unit_depth(world.geometry())


def _copy(teacher: VGGT) -> VGGT:
    copy = VGGT(teacher.config)
    copy.load_state_dict(teacher.state_dict())
    return copy


@torch.no_grad()
def measure_lgm(
    lgm: LatentGeometryModel, teacher: VGGT, clips: LatentClips, count: int = 256
) -> dict[str, dict[str, float]]:
    """Held-out errors of LGM and RGB model on the same rendered clips."""
    rows: dict[str, list[dict[str, Tensor]]] = {"lgm": [], "rgb": []}
    for low in range(0, min(count, len(clips)), 16):
        index = torch.arange(low, min(low + 16, count, len(clips)))
        world = clips.truth.world(index)
        target = world.geometry(every=1)
        rows["lgm"].append(geometry_errors(lgm(clips.latents[index].float()), target))
        rows["rgb"].append(geometry_errors(teacher(world.video.transpose(1, 2)), target))
    return {name: mean_errors(errors) for name, errors in rows.items()}


@torch.no_grad()
def generated_clips(pipeline: Path, cache: Path, prompts: int | None = None, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Clips of the base generator: latents (N, C, T', H', W') and RGB views (N, S, 3, H, W), float16; kept.

    `cache` is the file they are read from the next time.
    """
    if not cache.exists():
        model = WanVideoModel.from_pretrained(pipeline)
        prompts = prompts or GENERATED_PROMPTS
        shape = model.latent_spec.latent_shape(17, 64, 64)
        texts = sample_prompts(prompts, seed=5)
        latents, views = [], []
        for low in range(0, prompts, batch):
            text = model.encode_prompt(texts[low : low + batch])
            latents.append(ode_sample(model, text, shape=shape, seeds=list(range(low, low + len(text))), num_steps=20))
            views.append(model.decode(latents[-1])[:, :, ::4].transpose(1, 2).half())
        temporary = cache.with_suffix(".tmp")
        save_file({"latents": torch.cat(latents).half(), "views": torch.cat(views).contiguous()}, temporary)
        temporary.replace(cache)
    return _read(cache, "latents"), _read(cache, "views")
