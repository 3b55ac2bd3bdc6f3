"""Recipes of the embedded geometry networks: the teacher, and the judge (another architecture, another seed)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vggrpo.geometry import GeometryPrediction
from vggrpo.geometry.se3 import rotation_angle
from vggrpo.lgm.losses import geometry_errors, geometry_loss, unit_depth
from vggrpo.models.vggt import VGGT, VGGTConfig
from vggrpo.pretraining.data import Shards, augment
from vggrpo.pretraining.loop import Schedule, fit
from vggrpo.pretraining.matching import Matched
from vggrpo.rewards import geometry_reprojection_consistency
from vggrpo.world.perturb import wobble

TEACHER = VGGTConfig(stem_blocks=2, stem_radius=3, head_features=64, head_detail=True)
JUDGE = VGGTConfig(
    dim=128, heads=4, conv_layers=5, pairs=2, registers=0, stem_blocks=1, stem_radius=4, hooks=(1, 2), head_features=48,
    head_detail=True, mlp_ratio=2.0,
)  # fmt: skip
BATCH, VIEWS = 8, 5  # clips of that many views; more clips when they show fewer
# Not two: the CPU's bfloat16 convolution over fewer planes than its kernel has gives infinite gradients now and then.
FEW_SHARE, FEW_VIEWS = 0.5, 3
MATCH_WEIGHT = 0.15
NEAR_SHARE = 0.7
# Clips that do not hold together, of known geometry: what a judge of generated clips must see, and go on seeing while
# it learns to agree with itself on clips that do.
WOBBLE_SHARE, MAX_WOBBLE = 0.2, 4.0
CONSISTENCY_WEIGHT, CONSISTENCY_FROM = 3.0, 0.4  # from that share of the steps on: noise cannot be made consistent
# Generated clips come out of a VAE, softer than the renderer draws; some batches are made as soft.
BLUR_SHARE, BLUR_SIZE = 0.4, 26
TEACHER_SCHEDULE = Schedule(steps=4000, lr=1e-3)
JUDGE_SCHEDULE = Schedule(steps=4000, lr=1.2e-3, seed=7)


def train_geometry(
    shards: list[Path],
    folder: Path,
    config: VGGTConfig,
    schedule: Schedule,
    bf16: bool = True,
    start: VGGT | None = None,
) -> VGGT:
    """Train a network from scratch, or on from `start`, on the truth of rendered clips.

    Half of the batches show few views of many clips; the others are views 0, 4, 8, ... as in use, or nearer ones
    early on.
    """
    data = Shards.load(shards)
    torch.manual_seed(schedule.seed)

    def loss(model: Matched, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        every, first, views = _frames(step / schedule.steps, generator)
        index = torch.randint(len(data), (BATCH * VIEWS // views,), generator=generator)
        world = augment(data.world(index, first, every, views), generator)
        wobbling = bool(torch.rand((), generator=generator) < WOBBLE_SHARE)
        if wobbling:
            amplitude = MAX_WOBBLE * torch.rand(len(index), generator=generator)
            world = wobble(world, amplitude, int(torch.randint(2**31, (), generator=generator)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction, raw = model.network.predict(softened(world.video, generator).transpose(1, 2))
            match = model.loss(world)
        value, logs = geometry_loss(prediction, raw, unit_depth(world.geometry(every=1)))
        if wobbling:  # the displacements of the world below are not those of the picture
            return value, {}
        value, logs = value + MATCH_WEIGHT * match, logs | {"match": match.item()}
        if step < CONSISTENCY_FROM * schedule.steps:
            return value, logs
        error = consistency_error(prediction)
        return value + CONSISTENCY_WEIGHT * error, logs | {"e_geo": error.item()}

    network = VGGT(config)
    if start is not None:
        network.load_state_dict(start.state_dict())
    return fit(Matched(network), loss, schedule, folder).network


def _frames(done: float, generator: torch.Generator) -> tuple[int, int, int]:
    """Step between views, first frame and number of views of a batch, when a share `done` of the run is over.

    Few views of many clips teach depth and matching faster than five views of few.
    """
    if torch.rand((), generator=generator) < FEW_SHARE:
        every, views = int(torch.randint(1, 9, (), generator=generator)), FEW_VIEWS
    elif torch.rand((), generator=generator) < NEAR_SHARE * max(0.0, 1 - 3 * done):
        every, views = int(torch.randint(1, 4, (), generator=generator)), VIEWS
    else:
        return 4, 0, VIEWS
    return every, int(torch.randint(17 - (views - 1) * every, (), generator=generator)), views


def consistency_error(prediction: GeometryPrediction) -> Tensor:
    """The reward's own error, mean over the batch (clips that it cannot judge count as zero): differentiable."""
    reward = geometry_reprojection_consistency(prediction, stride=2)
    return reward.terms["e_geo"][reward.valid].sum() / len(reward.valid)


def softened(video: Tensor, generator: torch.Generator) -> Tensor:
    """The batch as it is, or with probability `BLUR_SHARE` at a lower resolution; video (B, 3, S, H, W)."""
    share, size = torch.rand(2, generator=generator).tolist()
    if share > BLUR_SHARE:
        return video
    h, w = video.shape[-2:]
    small = int(BLUR_SIZE + size * (h - BLUR_SIZE)), int(BLUR_SIZE + size * (w - BLUR_SIZE))
    frames = video.transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, small, mode="bilinear", antialias=True, align_corners=False)
    frames = F.interpolate(frames, (h, w), mode="bilinear", align_corners=False)
    return frames.unflatten(0, (len(video), -1)).transpose(1, 2)


@torch.no_grad()
def measure_geometry(model: VGGT, heldout: list[Path], clips: int = 256) -> dict[str, float]:
    """Mean held-out errors, and the pose errors of always answering the mean path (`*_of_mean`)."""
    data = Shards.load(heldout)
    rows: dict[str, list[Tensor]] = {}
    targets = []
    for low in range(0, min(clips, len(data)), 16):
        world = data.world(torch.arange(low, min(low + 16, clips, len(data))))
        target = world.geometry(every=1)
        targets.append(unit_depth(target).cam2world)
        for name, value in geometry_errors(model(world.video.transpose(1, 2)), target).items():
            rows.setdefault(name, []).append(value)
    out = {name: torch.cat(values).nanmean().item() for name, values in rows.items()}
    return out | mean_pose_errors(torch.cat(targets))


def mean_pose_errors(cam2world: Tensor) -> dict[str, float]:
    """Translation and rotation error of the constant answer "the mean pose of each view"; cam2world (N, S, 4, 4)."""
    centres = cam2world[:, 1:, :3, 3]
    u, _, vh = torch.linalg.svd(cam2world[:, 1:, :3, :3].mean(0))
    mean_rotation = u @ vh
    angle = rotation_angle(cam2world[:, 1:, :3, :3].transpose(-1, -2) @ mean_rotation)
    return {
        "translation_of_mean": (centres - centres.mean(0)).norm(dim=-1).mean().item(),
        "rotation_of_mean": angle.mean().item(),
    }
