"""What Any4D says, in the conventions of `GeometryPrediction`: rays and depth along them, motion seen from view 0.

Any4D gives each pixel a direction and a distance along it, and motion only for the pixels of view 0: where their points
are at the time of view k, relative to where they were. Motion on the grid of view i is what those points tell of it
when they are projected there:

    X_k(p) = X_0(p) + F_k(p)        flow of view i at the pixel that X_i(p) hits = X_{i+1}(p) - X_i(p)

A point counts in view i unless it lies behind the depth that view i has there: then something hides it. A point in
front of that depth counts, however far: it contradicts the view, and an error is not to be excused as unknown. Pixels
that no point of view 0 reaches (new, hidden, or out of the image in view 0) are unknown, and unknown pixels count as
moving. The authors report noise in the flow of what stands still, so motion under a threshold is none.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vggrpo.geometry import GeometryPrediction, anchor_cameras, pixel_grid, pixel_index, project
from vggrpo.models.border import pinhole

# Directions flatter than this (87 degrees off the axis) have no z-depth to speak of.
MIN_RAY_Z = 0.05


def intrinsics_from_rays(rays: Float[Tensor, "*batch H W 3"]) -> Float[Tensor, "*batch 3 3"]:
    """The pinhole camera that comes closest to a direction for each pixel: least squares of `u = fx x/z + cx` and of v.

    Directions that do not look forward take no part; where fewer than two do, the intrinsics are NaN.
    """
    forward = rays[..., 2] > MIN_RAY_Z
    weight = forward.to(rays)[..., None]
    z = torch.where(forward, rays[..., 2], torch.ones_like(rays[..., 2]))
    slope = rays[..., :2] / z[..., None] * weight  # (..., H, W, 2)
    grid = pixel_grid(rays.shape[-3], rays.shape[-2], device=rays.device, dtype=rays.dtype)
    count = weight.sum((-3, -2))
    mean_slope, mean_pixel = slope.sum((-3, -2)) / count, (grid * weight).sum((-3, -2)) / count
    off = (slope - mean_slope[..., None, None, :]) * weight
    focal = (off * grid).sum((-3, -2)) / off.square().sum((-3, -2))
    return pinhole(focal, mean_pixel - focal * mean_slope)


def z_depth(
    distance: Float[Tensor, "*batch H W"], rays: Float[Tensor, "*batch H W 3"]
) -> tuple[Float[Tensor, "*batch H W"], Bool[Tensor, "*batch H W"]]:
    """z-depth of distances along unit directions, and where there is one; elsewhere a positive placeholder."""
    z = rays[..., 2]
    return distance * z.clamp_min(MIN_RAY_Z), z > MIN_RAY_Z


def to_prediction(
    rays: Float[Tensor, "B S H W 3"],
    distance: Float[Tensor, "B S H W"],
    conf: Float[Tensor, "B S H W"],
    cam2world: Float[Tensor, "B S 4 4"],
    flow: Float[Tensor, "B S H W 3"],
    *,
    motion_threshold: float,
    hidden_tolerance: float,
) -> tuple[GeometryPrediction, Float[Tensor, "B S H W 3"]]:
    """All of Any4D's outputs, in metres, converted; and its flow as it is, in the anchored frame.

    Args:
        rays: unit directions in each camera's frame.
        distance: along the rays.
        conf: in [0, 1]; 0 = invalid.
        cam2world: not anchored: the predicted pose of view 0 is near the identity, not on it.
        flow: of view 0's points, from view 0 to each view, in the frame of `cam2world`.
        motion_threshold: how far a point must get, in median depths of view 0, to count as moving.
        hidden_tolerance: how far behind a view's own depth a point may lie and still be seen, relative.
    """
    depth, has_depth = z_depth(distance, rays)
    conf = conf * has_depth
    to_anchor = cam2world[:, 0, :3, :3].transpose(-1, -2)
    anchored = anchor_cameras(cam2world)
    intrinsics = intrinsics_from_rays(rays)
    prediction = GeometryPrediction.from_depth(anchored, intrinsics, depth, conf, is_metric=True)
    flow = torch.einsum("bij,bshwj->bshwi", to_anchor, flow)
    prediction.scene_flow, prediction.dynamic_mask = motion_on_each_view(
        prediction, flow, motion_threshold=motion_threshold, hidden_tolerance=hidden_tolerance
    )
    return prediction, flow


def motion_on_each_view(
    prediction: GeometryPrediction,
    flow: Float[Tensor, "B S H W 3"],
    *,
    motion_threshold: float,
    hidden_tolerance: float,
) -> tuple[Float[Tensor, "B S H W 3"], Bool[Tensor, "B S H W"]]:
    """Scene flow from view i to i + 1 on view i's own grid, and what moves or is unknown; see the module's docstring.

    Args:
        prediction: anchored cameras, depth and points; pixels of view 0 with conf 0 have no known point.
        flow: of view 0's points, from view 0 to each view, world frame; that of view 0 itself is taken as zero.
        motion_threshold: in median depths of view 0's known pixels. A point that gets farther at any time moves, in all
            views.
        hidden_tolerance: relative.

    Returns:
        Flow in the unit of the depth: zero in the last view, where nothing moves and where it is unknown; and the mask.
        The flow's gradient is that of the flow without the threshold.
    """
    flow = torch.cat([torch.zeros_like(flow[:, :1]), flow[:, 1:]], 1).flatten(2, 3)  # (B, S, N, 3)
    start = prediction.points[:, 0].detach().flatten(1, 2)  # (B, N, 3)
    known = (prediction.conf[:, 0] > 0).flatten(1)
    scale = torch.where(known, prediction.depth[:, 0].detach().flatten(1), torch.nan).nanmedian(1).values
    moves = flow.detach().norm(dim=-1).amax(1) > motion_threshold * scale[:, None]  # (B, N)
    views = flow.shape[1]
    step = torch.cat([flow[:, 1:] - flow[:, :-1], torch.zeros_like(flow[:, :1])], 1)
    # Gradients pass what the threshold stops: a student whose flow is still too small could not learn it otherwise.
    step = step - (step * ~moves[:, None, :, None]).detach()
    flows, masks = [], []
    for view in range(views):
        source, found = _seen_at(prediction, start + flow[:, view].detach(), known, view, hidden_tolerance)
        picked = step[:, view].gather(1, source[..., None].expand(-1, -1, 3))
        flows.append(picked * found[..., None])
        masks.append(~found | moves.gather(1, source))
    size = prediction.size
    return torch.stack(flows, 1).unflatten(2, size), torch.stack(masks, 1).unflatten(2, size)


def _seen_at(
    prediction: GeometryPrediction,
    points: Float[Tensor, "B N 3"],
    known: Bool[Tensor, "B N"],
    view: int,
    tolerance: float,
) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """For each pixel of a view the point that it shows, and whether there is one.

    A point covers the up to four pixels whose centres surround it. Where several cover a pixel, the one that fits the
    view's depth and the pixel's centre best wins.
    """
    here = slice(view, view + 1)
    uv, z = project(points, prediction.intrinsics[:, here].detach(), prediction.cam2world[:, here].detach())
    uv, z = uv[:, 0], z[:, 0]  # (B, N, 2), (B, N)
    # A little less than half a pixel: a point on a centre covers its own pixel alone.
    offsets = 0.499 * torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]).to(uv)
    corners = uv[:, None] + offsets[:, None]  # (B, 4, N, 2)
    index, inside = pixel_index(corners.flatten(1, 2), prediction.size)
    z, known = z.repeat(1, 4), known.repeat(1, 4)
    own = prediction.depth[:, view].detach().flatten(1)
    ratio = z / own.gather(1, index)
    counts = inside & known & (z > 0) & (ratio <= 1 + tolerance)
    centres = pixel_grid(*prediction.size, device=uv.device, dtype=uv.dtype).flatten(0, 1)
    away = (uv.repeat(1, 4, 1) - centres[index]).square().sum(-1)
    misfit = torch.where(counts, (ratio - 1).abs() / tolerance + away, torch.full_like(z, torch.inf))
    best = torch.full_like(own, torch.inf).scatter_reduce(1, index, misfit, "amin")
    wins = counts & (misfit <= best.gather(1, index))
    nobody = z.shape[1]
    order = torch.arange(nobody, device=z.device).expand_as(index)
    first = torch.full_like(own, nobody, dtype=torch.long)
    first = first.scatter_reduce(1, index, torch.where(wins, order, torch.full_like(order, nobody)), "amin")
    found = first < nobody
    return torch.where(found, first, torch.zeros_like(first)) % points.shape[1], found
