"""How far the camera goes, and the hinge that keeps it going.

Geometry rewards are cheapest to satisfy with a camera that stands still. `camera_travel` is reported beside every one
of them, and `camera_motion_hinge` takes reward away from a clip whose camera travels less than the base model's does
for the same prompt:

    travel = sum_i |c_{i+1} - c_i| / median depth + sum_i |log(R_i^T R_{i+1})|        (depths + radians)
    r_hinge = -max(0, keep - travel / base_travel)

The floor is relative because "a static shot of ..." should not be made to move. WorldAlign (METHOD.md section 6b)
uses one absolute floor.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction, invert_se3, safe_norm, so3_log
from vggrpo.rewards.base import (
    Reward,
    RewardContext,
    finite_clips,
    full_precision,
    hinge_below_base,
    judged,
    median_depth,
    usable_pixels,
)


def camera_steps(
    cam2world: Float[Tensor, "B S 4 4"],
) -> tuple[Float[Tensor, "B T 3"], Float[Tensor, "B T 3"]]:
    """Translations ``c_{i+1} - c_i`` (world frame) and turns ``log(R_i^T R_{i+1})`` (radians), T = S - 1 of each."""
    centres = cam2world[..., :3, 3]
    relative = invert_se3(cam2world[:, :-1]) @ cam2world[:, 1:]
    return centres[:, 1:] - centres[:, :-1], so3_log(relative[..., :3, :3])


def safe_cameras(prediction: GeometryPrediction) -> tuple[Tensor, Tensor, Tensor]:
    """Cameras and median depth (B,) that are safe to compute with, and which clips (B,) they are real for.

    A broken clip's numbers are replaced *before* they are used, because a NaN that is masked afterwards still
    poisons the gradient.
    """
    usable = usable_pixels(prediction)
    valid = finite_clips(prediction) & usable.flatten(1).any(1)
    still = torch.eye(4, dtype=prediction.cam2world.dtype, device=prediction.cam2world.device)
    cameras = torch.where(valid[:, None, None, None], prediction.cam2world, still)
    depth = torch.where(usable & valid[:, None, None, None], prediction.depth, torch.ones_like(prediction.depth))
    return cameras, median_depth(depth, usable), valid


@full_precision
def camera_travel(prediction: GeometryPrediction) -> Float[Tensor, " B"]:
    """Length of the camera path in median depths plus the total turn in radians; NaN where the geometry is broken.

    One view has a travel of zero. The gradient is finite for still cameras.
    """
    cameras, scale, valid = safe_cameras(prediction)
    steps, turns = camera_steps(cameras)
    travel = safe_norm(steps).sum(1) / scale + safe_norm(turns).sum(1)
    return torch.where(valid, travel, torch.full_like(travel, torch.nan))


@full_precision
def camera_motion_hinge(
    prediction: GeometryPrediction, *, context: RewardContext | None = None, keep: float = 1.0, still: float = 0.05
) -> Reward:
    """Penalty for a camera that travels less than the base model's, ``-max(0, keep - travel / base_travel)``, in
    [-keep, 0].

    Args:
        prediction: geometry of B clips.
        context: carries `base_travel`.
        keep: share of the base model's travel that costs nothing.
        still: base travel (median depths + radians) under which a prompt asks for a fixed camera: it never costs.

    Returns:
        The penalty; terms `travel`, `base_travel`, `travel_ratio` (travel over base travel, 1 for fixed cameras).
    """
    if context is None:
        raise UserError("camera_motion_hinge needs the base model's travel: pass RewardContext(prompts, base_travel)")
    travel = camera_travel(prediction)
    valid = travel.isfinite()
    travel = torch.where(valid, travel, torch.zeros_like(travel))
    base = context.base_travel_of(travel)
    valid = valid & base.isfinite()
    value, ratio = hinge_below_base(travel, base, keep, still)
    return judged(value, {"travel": travel, "base_travel": base, "travel_ratio": ratio}, valid)
