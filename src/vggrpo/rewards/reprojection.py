"""Geometry reprojection consistency, the second reward of VGGRPO (METHOD.md section 2).

The held pixels of all views (static, confident, away from depth edges) make one world cloud. A view i should see of
this cloud what its own depth D_i says:

    e_i   = mean over Omega_i of |z - D_i(u, v)|  /  median depth of the clip
    e_geo = mean of e_i over the 3 worst views             r_geo = 1 / (1 + e_geo)

A z-buffer decides which points of the cloud a view sees, and nothing else: z is each visible point's own depth and
D_i(u, v) is read, linearly in inverse depth, at the point's sub-pixel position. Rounding the point to a pixel and
comparing there (the naive splat) charges every moving camera for its quantisation and so pays for standing still.
Omega_i are the held pixels of view i that visible points hit; points that share a pixel are averaged first, so that a
dense corner of the cloud does not weigh more than a sparse one.

Who hides whom. The buffer holds the smallest ratio g = z / D_i(u, v) in each pixel, rather than the smallest z: on a
slanted surface the points of one pixel differ in z but all have g = 1. The view's own surface takes part with g = 1,
and a point is visible if its g is at most `tolerance` larger than the smallest. Hence

- a point *behind* D_i by more than the tolerance is hidden: that is what occlusion looks like, and it cannot be told
  from an error;
- a point *in front* of D_i is always visible, however far (it ought to have hidden what the view saw), hides the
  points behind it, and is charged in full. Nothing is clipped: a larger wobble always costs more.

An error that pushes view j's surface behind view i's is excused in view i, but the same error puts view i's surface
in front of view j's, where it is charged. With `leave_one_out` the view's own points and surface stay out, and errors
in both directions are charged, in those pixels whose point some other view sees; a surface that only view i knows
then charges what the others see behind it.

Gradients flow through depth, points and cameras of visible points (residual, interpolation and median); visibility is
fixed.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction, depth_edges, pixel_index, project, zbuffer
from vggrpo.rewards.base import Reward, RewardContext, finite_clips, full_precision, judged, median_depth, usable_pixels
from vggrpo.rewards.travel import camera_travel

Movers = Literal["dynamic", "subject", "none"]

# A read counts if all but this share of its interpolation weight lies on held pixels; a view's own points land within
# 1e-5.
_WEIGHT_SLACK = 1e-3
# Pairs of view and point that are looked at together. One takes about 100 bytes.
_PAIRS_AT_ONCE = 2**24


def moving_pixels(
    prediction: GeometryPrediction, movers: Movers, flow_threshold: float, scale: Float[Tensor, " B"]
) -> Bool[Tensor, "B S H W"]:
    """Pixels that are left out because they move, or may move.

    Args:
        prediction: geometry of B clips.
        movers: "dynamic": the dynamic mask, or scene flow above the threshold where there is no mask (the last view,
            whose flow is unknown, is then left out), or nothing for a geometry model that predicts neither.
            "subject": the subject mask, so that a wobbling wall is not excused as motion. "none": nothing.
        flow_threshold: in median depths.
        scale: median depth of each clip.
    """
    nothing = torch.zeros_like(prediction.depth, dtype=torch.bool)
    if movers == "none":
        return nothing
    if movers == "subject":
        if prediction.subject_mask is None:
            raise UserError("movers='subject' needs a geometry model with a subject mask; use movers='dynamic'")
        return prediction.subject_mask
    if movers != "dynamic":
        raise UserError(f"movers: expected 'dynamic', 'subject' or 'none', got {movers!r}")
    if prediction.dynamic_mask is not None:
        return prediction.dynamic_mask
    if prediction.scene_flow is None:
        return nothing
    slow = prediction.scene_flow.detach().norm(dim=-1) <= flow_threshold * scale[:, None, None, None]
    slow[:, -1] = False
    return ~slow  # a NaN flow is not slow: unknown counts as moving


def read_inverse_depth(
    depth: Float[Tensor, "B S H W"], held: Bool[Tensor, "B S H W"], uv: Float[Tensor, "B S N 2"]
) -> tuple[Float[Tensor, "B S N"], Bool[Tensor, "B S N"]]:
    """Inverse depth at sub-pixel positions, bilinear over held pixels, and where it could be read.

    Exact on planes. A position whose interpolation cell is not all held, or lies outside of the outermost pixel
    centres, can't be read; it gets the value 1.
    """
    batch, views, height, width = depth.shape
    inverse = torch.where(held, 1 / torch.where(held, depth, torch.ones_like(depth)), torch.zeros_like(depth))
    maps = torch.stack([inverse, held.to(depth)], 2).flatten(0, 1)  # (B S, 2, H, W)
    extent = torch.tensor([width, height], dtype=uv.dtype, device=uv.device)
    grid = (2 * uv / extent - 1).flatten(0, 1)[:, None]  # (B S, 1, N, 2); pixel centres at +0.5 <=> align_corners=False
    read = functional.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    value, weight = read[:, :, 0].unflatten(0, (batch, views)).unbind(2)  # (B, S, N) each
    readable = weight.detach() > 1 - _WEIGHT_SLACK
    one = torch.ones_like(value)
    return torch.where(readable, value / torch.where(readable, weight, one), one), readable


def _pixel_mean(
    values: Float[Tensor, "B S N"], index: Tensor, mask: Bool[Tensor, "B S N"], pixels: int
) -> tuple[Float[Tensor, "B S P"], Bool[Tensor, "B S P"]]:
    """Mean of the masked points in each pixel, and the pixels that have any."""
    zeros = torch.zeros((*values.shape[:2], pixels), dtype=values.dtype, device=values.device)
    total = zeros.scatter_add(-1, index, torch.where(mask, values, torch.zeros_like(values)))
    count = zeros.scatter_add(-1, index, mask.to(values))
    return total / count.clamp_min(1), count > 0


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last axis of what the mask keeps, 0 where it keeps nothing."""
    return torch.where(mask, values, torch.zeros_like(values)).sum(-1) / mask.sum(-1).clamp_min(1)


class _Cloud(NamedTuple):
    """The points of all views: places, the view that each comes from, and whether its pixel is held."""

    points: Float[Tensor, "B N 3"]
    source: Int[Tensor, " N"]
    held: Bool[Tensor, "B N"]


class _Look(NamedTuple):
    """The cloud as V views see it, (B, V, N): where it falls, z-depth, the view's own inverse depth there, the ratio of
    the two, the pixel; points that can be compared, and whether another view made them (V, N)."""

    uv: Float[Tensor, "B V N 2"]
    z: Float[Tensor, "B V N"]
    inverse: Float[Tensor, "B V N"]
    ratio: Float[Tensor, "B V N"]
    index: Int[Tensor, "B V N"]
    candidate: Bool[Tensor, "B V N"]
    foreign: Bool[Tensor, "V N"]


def _look(prediction: GeometryPrediction, held: Bool[Tensor, "B S H W"], cloud: _Cloud, views: slice) -> _Look:
    uv, z = project(cloud.points, prediction.intrinsics[:, views], prediction.cam2world[:, views])
    inverse, readable = read_inverse_depth(prediction.depth[:, views], held[:, views], uv)
    index, inside = pixel_index(uv.detach(), (held.shape[2], held.shape[3]))
    numbers = torch.arange(held.shape[1], device=held.device)[views]
    candidate = readable & inside & cloud.held[:, None]
    return _Look(uv, z, inverse, (z * inverse).detach(), index, candidate, cloud.source != numbers[:, None])


def _some_view_errors(
    prediction: GeometryPrediction,
    held: Bool[Tensor, "B S H W"],
    cloud: _Cloud,
    omega: Bool[Tensor, "B S P"],
    views: slice,
    *,
    tolerance: float,
    growth: int | None,
) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B V"], Float[Tensor, "B V"]]:
    """`_view_errors` of some views; with `growth`, own points stay out and the front grows by so many pixels."""
    uv, z, inverse, ratio, index, candidate, foreign = _look(prediction, held, cloud, views)
    omega, size = omega[:, views], (held.shape[2], held.shape[3])
    if growth is not None:
        candidate = candidate & foreign
    front = zbuffer(uv, ratio, size, mask=candidate)
    if growth is None:
        front = front.clamp_max(1)
    else:
        # Other views' points leave gaps through which hidden ones show. Ratios are level across a surface, so the
        # front may grow.
        front = -functional.max_pool2d(-front, 2 * growth + 1, stride=1, padding=growth)
    visible = candidate & (ratio <= (1 + tolerance) * front.flatten(-2).gather(-1, index)) & omega.gather(-1, index)

    pixels = size[0] * size[1]
    error, hit = _pixel_mean((z - 1 / inverse).abs(), index, visible, pixels)
    _, compared = _pixel_mean(ratio, index, candidate & foreign & omega.gather(-1, index), pixels)
    return _masked_mean(error, hit), hit.sum(-1) / pixels, compared.sum(-1) / pixels


def _view_errors(
    prediction: GeometryPrediction, held: Bool[Tensor, "B S H W"], *, tolerance: float, stride: int, leave_one_out: bool
) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B S"], Float[Tensor, "B S"]]:
    """Each view's mean residual (unit of the depth), share of pixels in Omega, share hit by other views' points.

    Views know nothing of one another but the cloud, so they are looked at in parts that fit the memory; with gradients
    a part is computed again on the way back.
    """
    _, count, height, width = held.shape
    source_held = held[:, :, ::stride, ::stride]
    per_view = source_held.shape[2] * source_held.shape[3]
    cloud = _Cloud(
        prediction.points[:, :, ::stride, ::stride].flatten(1, 3),
        torch.arange(count, device=held.device).repeat_interleave(per_view),
        source_held.flatten(1),
    )
    at_once = max(1, _PAIRS_AT_ONCE // (len(held) * count * per_view))
    parts = [slice(start, start + at_once) for start in range(0, count, at_once)]
    omega = held.flatten(-2)
    if leave_one_out:
        with torch.no_grad():  # which points some other view sees
            looks = (_look(prediction, held, cloud, part) for part in parts)
            found = [(k.candidate & k.foreign & (k.ratio <= 1 + tolerance)).any(1) for k in looks]
        seen = torch.stack(found).any(0).unflatten(-1, source_held.shape[1:])  # (B, S, H/k, W/k)
        seen = seen.repeat_interleave(stride, 2).repeat_interleave(stride, 3)[:, :, :height, :width]
        omega = omega & seen.flatten(-2)
    errors = partial(_some_view_errors, tolerance=tolerance, growth=stride if leave_one_out else None)
    if len(parts) > 1 and torch.is_grad_enabled():
        errors = partial(checkpoint, errors, use_reentrant=False)
    each = [errors(prediction, held, cloud, omega, part) for part in parts]
    error, hit, compared = (torch.cat(values, 1) for values in zip(*each, strict=True))
    return error, hit, compared


def _mean_of_worst(errors: Float[Tensor, "B S"], counted: Bool[Tensor, "B S"], worst: int) -> Float[Tensor, " B"]:
    """Mean of the `worst` largest errors among the counted views (of all of them, if fewer); 0 where none counts."""
    ranked = torch.where(counted, errors, torch.full_like(errors, -1)).topk(min(worst, errors.shape[1]), dim=1).values
    return _masked_mean(ranked, ranked >= 0)


@full_precision
def geometry_reprojection_consistency(
    prediction: GeometryPrediction,
    *,
    context: RewardContext | None = None,
    movers: Movers = "dynamic",
    flow_threshold: NonNegativeFloat = 0.01,
    confidence_threshold: NonNegativeFloat = 0.1,
    edge_threshold: NonNegativeFloat = 0.03,
    edge_radius: NonNegativeInt = 1,
    tolerance: NonNegativeFloat = 0.01,
    worst_views: PositiveInt = 3,
    min_overlap: NonNegativeFloat = 0.01,
    leave_one_out: bool = False,
    stride: PositiveInt = 1,
    per_view: bool = False,
) -> Reward:
    """``r_geo`` of the predicted geometry; the module's docstring has the definition.

    Args:
        prediction: geometry of B clips.
        context: unused; part of every reward's signature.
        movers: which mask takes moving things out of the comparison (see `moving_pixels`).
        flow_threshold: scene flow that counts as motion where there is no dynamic mask, median depths per view.
        confidence_threshold: pixels under it are left out.
        edge_threshold: relative second difference of inverse depth that makes an edge (see `depth_edges`).
        edge_radius: pixels by which edges grow.
        tolerance: how far behind the front-most point another one may lie and still be compared, relative.
        worst_views: e_geo is the mean over this many views with the largest errors.
        min_overlap: a view counts only if another view's points hit at least this share of its pixels. A view that
            nothing can contradict is no evidence, and a clip without a single such view is invalid.
        leave_one_out: compare each view with the other views' points only.
        stride: use every stride-th pixel of both axes as a point; memory falls with its square. A thinner cloud hides
            less of itself, so errors of different strides are not to be compared. A view's points are about 100 bytes
            each, of B x S H W; as many views as fit 1.7 GB are looked at together, one at least.
        per_view: add the per-view errors as the term `e_geo_per_view` (B, S), NaN for views that do not count.

    Returns:
        The reward in (0, 1]; terms `e_geo`, `held` (share of all pixels compared: static, confident, visible), `static`
        (share that was static, confident and off edges), `overlap` (share hit by another view's points) and `travel`.
    """
    del context
    valid = finite_clips(prediction)
    usable = usable_pixels(prediction, confidence_threshold) & valid[:, None, None, None]
    safe = _made_safe(prediction, usable, valid)
    scale = median_depth(safe.depth, usable)
    edges = depth_edges(safe.depth.detach(), threshold=edge_threshold, radius=edge_radius, mask=usable)
    held = usable & ~edges & ~moving_pixels(prediction, movers, flow_threshold, scale.detach())
    errors, share, overlap = _view_errors(safe, held, tolerance=tolerance, stride=stride, leave_one_out=leave_one_out)
    counted = (overlap > 0) & (overlap >= min_overlap) & (share > 0)
    errors = errors / scale[:, None]
    e_geo = _mean_of_worst(errors, counted, worst_views)
    terms = {
        "e_geo": e_geo,
        "held": share.mean(1),
        "static": held.to(share).mean((1, 2, 3)),
        "overlap": overlap.mean(1),
        "travel": camera_travel(prediction),
    }
    if per_view:
        terms["e_geo_per_view"] = torch.where(counted, errors, torch.full_like(errors, torch.nan))
    return judged(1 / (1 + e_geo), terms, valid & counted.any(1) & e_geo.isfinite())


def _made_safe(
    prediction: GeometryPrediction, usable: Bool[Tensor, "B S H W"], valid: Bool[Tensor, " B"]
) -> GeometryPrediction:
    """The prediction with harmless numbers in unusable pixels and broken clips, so that gradients stay finite."""
    device, dtype = prediction.depth.device, prediction.depth.dtype
    clip = valid[:, None, None, None]
    return GeometryPrediction(
        cam2world=torch.where(clip, prediction.cam2world, torch.eye(4, device=device, dtype=dtype)),
        intrinsics=torch.where(clip, prediction.intrinsics, torch.eye(3, device=device, dtype=dtype)),
        depth=torch.where(usable, prediction.depth, torch.ones_like(prediction.depth)),
        points=torch.where(usable[..., None], prediction.points, torch.zeros_like(prediction.points)),
        conf=prediction.conf,
        frame_index=prediction.frame_index,
    )
