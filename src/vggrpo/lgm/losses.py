"""How far a predicted geometry is from a target: losses that train geometry networks and LGMs, errors that judge them.

The target is the truth of rendered clips or a teacher's prediction. Both are brought to one unit first: the first
view's median depth is 1, so nothing depends on the metre.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vggrpo.geometry import GeometryPrediction
from vggrpo.geometry.se3 import invert_se3, rotation_angle

# Relative depth error at which confidence is 1/e.
CONF_SCALE = 0.05
WEIGHTS = {
    "depth": 3.0,
    "slope": 1.0,
    "translation": 4.0,
    "rotation": 4.0,
    "focal": 0.5,
    "points": 0.5,
    "conf": 0.05,
    "flow": 1.0,
    "dynamic": 0.05,
    "subject": 0.05,
}


def known_pixels(geometry: GeometryPrediction) -> Bool[Tensor, "B S H W"]:
    """Pixels of which a geometry says something: confident at all, at a finite depth in front of the camera."""
    return (geometry.conf > 0) & geometry.depth.isfinite() & (geometry.depth > 0)


def depth_unit(geometry: GeometryPrediction) -> Float[Tensor, " B"]:
    """The first view's median depth over its known pixels; of all views, where that view has none (NaN: nor has any).

    A clip that fades in from black has no depth in its first view, and still needs a unit.
    """
    known = known_pixels(geometry)
    unit = _known_median(geometry.depth[:, 0], known[:, 0])
    return torch.where(unit.isnan(), _known_median(geometry.depth, known), unit).clamp_min(1e-6)


def _known_median(values: Float[Tensor, "B ..."], known: Bool[Tensor, "B ..."]) -> Float[Tensor, " B"]:
    return torch.where(known, values, torch.nan).flatten(1).nanmedian(1).values


def _known_mean(values: Float[Tensor, "B ..."], known: Bool[Tensor, "B ..."]) -> Float[Tensor, " B"]:
    """Mean over the known pixels of each clip, NaN where there are none; the plain mean, bit by bit, if all are."""
    share = known.flatten(1).sum(1).to(values.dtype) / known[0].numel()
    return torch.where(known, values, 0).flatten(1).mean(1) / share


def unit_depth(geometry: GeometryPrediction, scale: Float[Tensor, " B"] | None = None) -> GeometryPrediction:
    """The same geometry in units of the first view's median depth, or of another length a clip."""
    scale = depth_unit(geometry) if scale is None else scale
    maps = scale[:, None, None, None]
    cam2world = geometry.cam2world.clone()
    cam2world[..., :3, 3] = cam2world[..., :3, 3] / scale[:, None, None]
    flow = None if geometry.scene_flow is None else geometry.scene_flow / maps[..., None]
    return replace(
        geometry,
        cam2world=cam2world,
        depth=geometry.depth / maps,
        points=geometry.points / maps[..., None],
        scene_flow=flow,
    )


def relative_poses(cam2world: Float[Tensor, "B S 4 4"]) -> Float[Tensor, "B P 4 4"]:
    """Pose of view j seen from view i for all i < j."""
    i, j = torch.triu_indices(cam2world.shape[1], cam2world.shape[1], 1, device=cam2world.device)
    return invert_se3(cam2world)[:, i] @ cam2world[:, j]


def geometry_loss(
    prediction: GeometryPrediction,
    raw: dict[str, Tensor],
    target: GeometryPrediction,
    weights: dict[str, float] = WEIGHTS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of L1-like losses, one a head, and each for the log.

    Args:
        raw: logits of confidence and masks, as `GeometryModel.predict` gives them.
        target: known at every pixel, in units of its first view's median depth (`unit_depth`).
    """
    parts, error = _shape_parts(prediction, target, torch.ones_like(target.depth, dtype=torch.bool))
    parts["conf"] = F.binary_cross_entropy_with_logits(raw["conf_logit"], torch.exp(-error.detach() / CONF_SCALE))
    _add_masks(parts, raw, target)
    return _weighted(parts, weights)


def distillation_loss(
    prediction: GeometryPrediction,
    raw: dict[str, Tensor],
    teacher: GeometryPrediction,
    weights: dict[str, float] = WEIGHTS,
    first_flow: Float[Tensor, "B S H W 3"] | None = None,
    moving_pixels: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`geometry_loss` against the word of a teacher, in the teacher's unit.

    Its confidence is learned as it is, and what it does not know (confidence 0, flow not finite) is no target.

    Args:
        raw: logits of the masks, where the network has such heads (`dynamic_logit`, `subject_logit`).
        first_flow: the teacher's `flow_from_first`, for a backend whose flow head says that: it is learned in place of
            the scene flow, which such a backend derives from it by visibility.
        moving_pixels: what the error on moving pixels is divided by, where these clips are a part of a batch: the
            `moving_mask` pixels of all of it times the share of these clips; None: those of these clips.
    """
    scale = depth_unit(teacher).nan_to_num(1.0)  # of a clip without a known depth, cameras are learned in any unit
    prediction, target = unit_depth(prediction, scale), unit_depth(teacher, scale)
    known = known_pixels(teacher)
    own = prediction.detach()
    target.depth = torch.where(known, target.depth, own.depth)
    target.points = torch.where(known[..., None], target.points, own.points)
    parts, _ = _shape_parts(prediction, target, known, moving_pixels)
    if first_flow is not None:
        miss = (raw["flow_from_first"] - first_flow).abs().sum(-1) / scale[:, None, None, None]
        parts["flow"] = torch.where(known[:, :1], miss, torch.zeros_like(miss)).mean()
    parts["conf"] = (prediction.conf - target.conf).abs().mean()
    _add_masks(parts, raw, target)
    return _weighted(parts, weights)


# Flow up to this is none, in first-view median depths.
_STILL = 1e-6


def moving_mask(teacher: GeometryPrediction) -> Bool[Tensor, "B S H W"] | None:
    """Where a teacher knows that something moves; None if it tells no flow."""
    flow = unit_depth(teacher).scene_flow
    if flow is None:
        return None
    return known_pixels(teacher) & flow.isfinite().all(-1) & (flow.abs().sum(-1) > _STILL)


def _weighted(parts: dict[str, Tensor], weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    total = sum(weights[name] * value for name, value in parts.items())
    return total, {name: value.detach() for name, value in parts.items()}


def _add_masks(parts: dict[str, Tensor], raw: dict[str, Tensor], target: GeometryPrediction) -> None:
    for name, mask in (("dynamic", target.dynamic_mask), ("subject", target.subject_mask)):
        if mask is not None and f"{name}_logit" in raw:  # not every backend has such a head
            parts[name] = F.binary_cross_entropy_with_logits(raw[f"{name}_logit"], mask.float())


def _shape_parts(
    prediction: GeometryPrediction,
    target: GeometryPrediction,
    known: Bool[Tensor, "B S H W"],
    moving_pixels: Tensor | float | None = None,
) -> tuple[dict[str, Tensor], Float[Tensor, "B S H W"]]:
    """Losses of depth, cameras, points and flow, and the relative depth error of each pixel.

    Args:
        target: at pixels that are not `known`, depth and points are the prediction's own; flow may be anything.
        moving_pixels: see `distillation_loss`.
    """
    depth = target.depth
    log_ratio = prediction.depth.log() - depth.log()
    error = log_ratio.abs()
    rel, want = relative_poses(prediction.cam2world), relative_poses(target.cam2world)
    turn = want[..., :3, :3].transpose(-1, -2) @ rel[..., :3, :3]
    axis = (
        torch.stack(
            [turn[..., 2, 1] - turn[..., 1, 2], turn[..., 0, 2] - turn[..., 2, 0], turn[..., 1, 0] - turn[..., 0, 1]],
            -1,
        )
        / 2
    )
    parts = {
        "depth": error.mean(),
        "slope": _slope(log_ratio, known, -1) + _slope(log_ratio, known, -2),
        "translation": (rel[..., :3, 3] - want[..., :3, 3]).abs().sum(-1).mean(),
        "rotation": axis.abs().sum(-1).mean(),
        "focal": (prediction.intrinsics[..., [0, 1], [0, 1]].log() - target.intrinsics[..., [0, 1], [0, 1]].log())
        .abs()
        .mean(),
        "points": ((prediction.points - target.points).norm(dim=-1) / depth).mean(),
    }
    if target.scene_flow is not None and prediction.scene_flow is not None:
        told = known & target.scene_flow.isfinite().all(-1)
        flow = torch.where(told[..., None], target.scene_flow, prediction.scene_flow.detach())
        miss = (prediction.scene_flow - flow).abs().sum(-1)
        moving = told & (flow.abs().sum(-1) > _STILL)
        count = moving.sum().clamp_min(1) if moving_pixels is None else moving_pixels
        # Few pixels move, so they count as much as all the others together.
        parts["flow"] = miss.mean() + (miss * moving).sum() / count
    return parts, error


def _slope(log_ratio: Float[Tensor, "B S H W"], known: Bool[Tensor, "B S H W"], axis: int) -> Float[Tensor, ""]:
    """Mean difference of the depth error between neighbours; nothing where either of them is not known."""
    last = known.shape[axis] - 1
    both = known.narrow(axis, 0, last) & known.narrow(axis, 1, last)
    return torch.where(both, log_ratio.diff(dim=axis), 0).abs().mean()


@torch.no_grad()
def geometry_errors(prediction: GeometryPrediction, target: GeometryPrediction) -> dict[str, Float[Tensor, " B"]]:
    """Errors of each clip after scale alignment by the clip's median depth ratio.

    Maps are compared where the target is known (`known_pixels`), cameras always.

    `abs_rel`: mean |d - d*| / d* (nan if no pixel is known). `translation`: mean distance of camera centres of views
    1.., in first-view median depths.
    `rotation`: mean angle, radians. `fov`: mean absolute error, radians. `flow`: mean end-point error on moving
    pixels (nan if none).
    `dynamic_iou`: intersection over union of the dynamic mask (nan if neither has any).
    """
    known = known_pixels(target)
    target = unit_depth(target)
    ratio = _known_median(target.depth / prediction.depth, known)
    depth = prediction.depth * ratio[:, None, None, None]
    centres = prediction.cam2world[:, 1:, :3, 3] * ratio[:, None, None]
    turn = prediction.cam2world[:, 1:, :3, :3].transpose(-1, -2) @ target.cam2world[:, 1:, :3, :3]
    width = prediction.depth.shape[-1]
    fov = [2 * torch.atan(width / 2 / g.intrinsics[..., 0, 0]) for g in (prediction, target)]
    errors = {
        "abs_rel": _known_mean((depth - target.depth).abs() / target.depth, known),
        "translation": (centres - target.cam2world[:, 1:, :3, 3]).norm(dim=-1).mean(1),
        "rotation": rotation_angle(turn).mean(1),
        "fov": (fov[0] - fov[1]).abs().mean(1),
    }
    if target.scene_flow is not None and prediction.scene_flow is not None:
        told = known & target.scene_flow.isfinite().all(-1)
        moving = told & (target.scene_flow.norm(dim=-1) > 1e-6)
        miss = (prediction.scene_flow * ratio[:, None, None, None, None] - target.scene_flow).norm(dim=-1)
        errors["flow"] = torch.where(moving, miss, 0).flatten(1).sum(1) / moving.flatten(1).sum(1)
    if target.dynamic_mask is not None and prediction.dynamic_mask is not None:
        both = (prediction.dynamic_mask & target.dynamic_mask & known).flatten(1).sum(1)
        errors["dynamic_iou"] = both / ((prediction.dynamic_mask | target.dynamic_mask) & known).flatten(1).sum(1)
    return errors
