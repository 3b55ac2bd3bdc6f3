"""Epipolar geometry of two views: essential and fundamental matrices from cameras, and the Sampson distance of matches.

Positions are pixels (u, v) with pixel centres at +0.5, as everywhere; x = (u, v, 1).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.geometry.se3 import hat, relative_pose, safe_norm


def essential_from_cameras(
    cam2world_a: Float[Tensor, "*batch 4 4"], cam2world_b: Float[Tensor, "*batch 4 4"]
) -> Float[Tensor, "*batch 3 3"]:
    """``E = [t]x R`` with ``X_b = R X_a + t``, so that ``y_b^T E y_a = 0`` for rays y of one point.

    Args:
        cam2world_a: poses of the first views.
        cam2world_b: poses of the second views.

    Returns:
        Essential matrices in the unit of the translation; zero for views from one centre, which have no epipolar
        geometry.
    """
    a_to_b = relative_pose(cam2world_b, cam2world_a)
    return hat(a_to_b[..., :3, 3]) @ a_to_b[..., :3, :3]


def fundamental_from_cameras(
    cam2world_a: Float[Tensor, "*batch 4 4"],
    intrinsics_a: Float[Tensor, "*batch 3 3"],
    cam2world_b: Float[Tensor, "*batch 4 4"],
    intrinsics_b: Float[Tensor, "*batch 3 3"],
) -> Float[Tensor, "*batch 3 3"]:
    """``F = K_b^-T E K_a^-1``, so that ``x_b^T F x_a = 0`` for the pixel positions x of one static point."""
    essential = essential_from_cameras(cam2world_a, cam2world_b)
    return torch.linalg.inv(intrinsics_b).transpose(-1, -2) @ essential @ torch.linalg.inv(intrinsics_a)


def homogeneous(positions: Float[Tensor, "*batch N D"]) -> Float[Tensor, "*batch N E"]:
    """Positions with a 1 appended, E = D + 1."""
    return torch.cat([positions, torch.ones_like(positions[..., :1])], -1)


def epipolar_lines(
    fundamental: Float[Tensor, "*batch 3 3"], positions_a: Float[Tensor, "*batch N 2"]
) -> Float[Tensor, "*batch N 3"]:
    """Lines ``l = F x_a`` in the second view on which the matches of the first view's positions lie."""
    return homogeneous(positions_a) @ fundamental.transpose(-1, -2)


def sampson_distance(
    fundamental: Float[Tensor, "*batch 3 3"],
    positions_a: Float[Tensor, "*batch N 2"],
    positions_b: Float[Tensor, "*batch N 2"],
) -> Float[Tensor, "*batch N"]:
    """First-order distance of a match from perfect epipolar geometry.

    ``|x_b^T F x_a| / sqrt((F x_a)_1^2 + (F x_a)_2^2 + (F^T x_b)_1^2 + (F^T x_b)_2^2)``: how far the four coordinates
    have to move together, to first order, until the constraint holds.

    Args:
        fundamental: matrices of any scale.
        positions_a: pixels in the first view.
        positions_b: their matches in the second view.

    Returns:
        Distances in pixels, >= 0. NaN where F says nothing: at both epipoles at once, or if F is zero.
    """
    lines_b = epipolar_lines(fundamental, positions_a)
    lines_a = epipolar_lines(fundamental.transpose(-1, -2), positions_b)
    constraint = (homogeneous(positions_b) * lines_b).sum(-1)
    slope = safe_norm(torch.cat([lines_a[..., :2], lines_b[..., :2]], -1))
    says_something = slope > 0
    distance = constraint.abs() / torch.where(says_something, slope, torch.ones_like(slope))
    return torch.where(says_something, distance, torch.full_like(distance, torch.nan))
