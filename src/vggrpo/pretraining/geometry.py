"""Recipes of the embedded geometry networks: the teacher, and the judge (another architecture, another seed)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vggrpo.geometry import GeometryPrediction
from vggrpo.geometry.se3 import rotation_angle
from vggrpo.lgm.losses import geometry_errors, geometry_loss, unit_depth
from vggrpo.models.vggt import VGGT, VGGTConfig
from vggrpo.pretraining.data import Shards, augment
from vggrpo.pretraining.loop import Logs, Schedule, Watch, fit, half_precision
from vggrpo.pretraining.matching import Matched
from vggrpo.rewards import geometry_reprojection_consistency
from vggrpo.rewards.camera_motion import normalised_acceleration
from vggrpo.rewards.travel import camera_steps
from vggrpo.world.perturb import wobble

TEACHER = VGGTConfig(stem_blocks=2, stem_displacement=True, head_features=64, head_detail=True)
JUDGE = VGGTConfig(
    dim=128, heads=4, conv_layers=6, pairs=4, registers=0, stem_blocks=2, stem_displacement=True, hooks=(2, 4),
    head_features=48, head_detail=True, mlp_ratio=2.0,
)  # fmt: skip
BATCH, VIEWS = 8, 5  # clips of that many views; more clips when they show fewer
# Not two: the CPU's bfloat16 convolution over fewer planes than its kernel has gives infinite gradients now and then.
FEW_SHARE, FEW_VIEWS = 0.5, 3
MATCH_WEIGHT = 0.15
NEAR_SHARE = 0.7
# Clips that do not hold together, of known geometry: what a judge of generated clips must see, and go on seeing while
# it learns to agree with itself on clips that do.
WOBBLE_SHARE, MAX_WOBBLE = 0.2, 4.0
# What the rewards will ask is asked while training: their errors on the prediction are to be those on the truth, of
# the reprojection from that share of the steps on, because noise cannot be made consistent.
CONSISTENCY_WEIGHT, CONSISTENCY_FROM = 3.0, 0.4
# With the rewards' own eps of .001 a pan's translation, which is noise, would count as much as any.
SMOOTHNESS_WEIGHT, SMOOTHNESS_EPS = 0.3, 0.03
# Generated clips come out of a VAE, softer than the renderer draws; some batches are made as soft.
BLUR_SHARE, BLUR_SIZE = 0.4, 26
TEACHER_SCHEDULE = Schedule(steps=4000, lr=1e-3)
JUDGE_SCHEDULE = Schedule(steps=4000, lr=1.2e-3, seed=7)


def train_geometry(
    data: Shards,
    folder: Path,
    config: VGGTConfig,
    schedule: Schedule,
    bf16: bool = True,
    start: VGGT | None = None,
    watch: Watch | None = None,
) -> VGGT:
    """Train a network from scratch, or on from `start`, on the truth of rendered clips and on their device.

    Half of the batches show few views of many clips; the others are views 0, 4, 8, ... as in use, or nearer ones
    early on.
    """
    device, clips = data.device, BATCH * VIEWS * schedule.batch_scale
    torch.manual_seed(schedule.seed)

    def loss(model: Matched, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        every, first, views = _frames(step / schedule.steps, generator)
        index = torch.randint(len(data), (clips // views,), generator=generator)
        world = augment(data.world(index, first, every, views), generator)
        wobbling = bool(torch.rand((), generator=generator) < WOBBLE_SHARE)
        if wobbling:
            amplitude = MAX_WOBBLE * torch.rand(len(index), generator=generator)
            world = wobble(world, amplitude, int(torch.randint(2**31, (), generator=generator)))
        with half_precision(device, bf16):
            prediction, raw = model.network.predict(softened(world.video, generator).transpose(1, 2))
            # The displacements of a wobbling world are not those of its picture.
            match = torch.zeros((), device=device) if wobbling else model.loss(world)
        target = unit_depth(world.geometry(every=1))
        value, logs = geometry_loss(prediction, raw, target)
        extra, more = reward_loss(prediction, target, consistency=step >= CONSISTENCY_FROM * schedule.steps)
        value = value + MATCH_WEIGHT * match + extra
        return value, more if wobbling else logs | more | {"match": match.detach()}

    network = VGGT(config)
    if start is not None:
        network.load_state_dict(start.state_dict())
    return fit(Matched(network).to(device), loss, schedule, folder, watch).network


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


def reward_loss(
    prediction: GeometryPrediction, target: GeometryPrediction, *, consistency: bool
) -> tuple[Tensor, Logs]:
    """How far the rewards' errors on a prediction are from those on the truth, weighted, and each for the log.

    Clips that a reward cannot judge count as zero. `consistency`: with the reprojection error, the costly one.
    """
    shaken = (_shake(prediction.cam2world) - _shake(target.cam2world)).abs().mean()
    parts = {"shake": SMOOTHNESS_WEIGHT * shaken}
    if consistency:
        found, wanted = (geometry_reprojection_consistency(g, stride=2) for g in (prediction, target))
        known = found.valid & wanted.valid
        one = torch.ones_like(found.value)
        # From the values, e = 1/r - 1: a reward's terms are cut off from the graph.
        miss = 1 / torch.where(known, found.value, one) - 1 / torch.where(known, wanted.value, one)
        parts["e_geo"] = CONSISTENCY_WEIGHT * miss.abs().mean()
    return torch.stack(list(parts.values())).sum(), {f"miss_{name}": part.detach() for name, part in parts.items()}


def _shake(cam2world: Float[Tensor, "B S 4 4"]) -> Float[Tensor, "B 2"]:
    """`e_trans` and `e_rot` of a path in units of the first view's median depth."""
    eps = cam2world.new_full((len(cam2world),), SMOOTHNESS_EPS)
    return torch.stack([normalised_acceleration(velocity, eps) for velocity in camera_steps(cam2world)], -1)


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
def measure_geometry(model: VGGT, data: Shards, clips: int = 256) -> dict[str, float]:
    """Mean held-out errors, and the pose errors of always answering the mean path (`*_of_mean`)."""
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
