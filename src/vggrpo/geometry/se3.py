"""Rigid motions: the exponential and logarithm of SO(3), inverses, relative and anchored camera poses.

Everything here is differentiable with finite gradients for every rotation, the identity and half turns included,
because guidance and direct reward training push gradients through the cameras of still shots and pans.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def safe_norm(vector: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
    """Euclidean norm over the last axis, whose gradient at zero is zero instead of NaN.

    Args:
        vector: vectors of any unit.

    Returns:
        ``|vector|`` in the same unit.
    """
    squared = vector.square().sum(-1)
    is_zero = squared == 0
    length = torch.where(is_zero, torch.ones_like(squared), squared).sqrt()
    return torch.where(is_zero, torch.zeros_like(squared), length)


def hat(vector: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """The skew-symmetric matrix ``[v]x`` with ``[v]x u = v x u``."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def so3_exp(rotation_vector: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Rodrigues' formula ``R = I + sin(a)/a [w]x + (1-cos(a))/a^2 [w]x^2`` with ``a = |w|``.

    Args:
        rotation_vector: axis times angle, radians.

    Returns:
        Rotation matrices.
    """
    squared = rotation_vector.square().sum(-1)
    is_small = squared < 1e-6
    angle = torch.where(is_small, torch.ones_like(squared), squared).sqrt()
    # The series are exact to 1e-14 below an angle of 1e-3, where 1 - cos(a) would cancel.
    sine = torch.where(is_small, 1 - squared / 6 + squared.square() / 120, angle.sin() / angle)
    half = 0.5 * angle
    cosine = torch.where(is_small, 0.5 - squared / 24 + squared.square() / 720, 0.5 * (half.sin() / half).square())
    skew = hat(rotation_vector)
    identity = torch.eye(3, dtype=rotation_vector.dtype, device=rotation_vector.device)
    return identity + sine[..., None, None] * skew + cosine[..., None, None] * (skew @ skew)


def _unit_quaternion(rotation: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 4"]:
    """Quaternion (w, x, y, z) with w >= 0.

    The matrix ``4 q q^T`` is linear in the rotation. Its row with the largest diagonal element has norm >= 2, so that
    normalising this row loses neither precision nor gradient anywhere on SO(3).
    """
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = (row.unbind(-1) for row in rotation.unbind(-2))
    outer = torch.stack(
        [
            torch.stack([1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01], -1),
            torch.stack([m21 - m12, 1 + m00 - m11 - m22, m10 + m01, m02 + m20], -1),
            torch.stack([m02 - m20, m10 + m01, 1 - m00 + m11 - m22, m12 + m21], -1),
            torch.stack([m10 - m01, m02 + m20, m12 + m21, 1 - m00 - m11 + m22], -1),
        ],
        -2,
    )  # (..., 4, 4)
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*outer.shape[:-2], 1, 4)
    row = outer.gather(-2, best).squeeze(-2)
    quaternion = row / row.norm(dim=-1, keepdim=True)
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def so3_log(rotation: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3"]:
    """Axis-angle vector of a rotation, ``log(R) = 2 atan2(|v|, w) v/|v|`` of its unit quaternion ``(w, v)``.

    Args:
        rotation: rotation matrices.

    Returns:
        Axis times angle, radians, angle in [0, pi]. At exactly pi either of the two opposite axes is returned.
    """
    quaternion = _unit_quaternion(rotation)
    w, v = quaternion[..., 0], quaternion[..., 1:]
    squared = v.square().sum(-1)
    is_small = squared < 1e-8
    sine = torch.where(is_small, torch.ones_like(squared), squared).sqrt()
    safe_w = torch.where(is_small, w, torch.ones_like(w))
    series = 2 / safe_w * (1 - squared / (3 * safe_w.square()))
    scale = torch.where(is_small, series, 2 * torch.atan2(sine, w) / sine)
    return scale[..., None] * v


def rotation_angle(rotation: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch"]:
    """Angle of a rotation in radians, in [0, pi]."""
    return safe_norm(so3_log(rotation))


def invert_se3(pose: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 4 4"]:
    """Inverse of rigid motions, ``[R t; 0 1]^-1 = [R^T, -R^T t; 0 1]``."""
    rotation = pose[..., :3, :3].transpose(-1, -2)
    translation = -(rotation @ pose[..., :3, 3:])
    return torch.cat([torch.cat([rotation, translation], -1), pose[..., 3:, :]], -2)


def relative_pose(
    cam2world_a: Float[Tensor, "*batch 4 4"], cam2world_b: Float[Tensor, "*batch 4 4"]
) -> Float[Tensor, "*batch 4 4"]:
    """Pose of camera b in camera a's frame, ``A^-1 B`` (maps points of b's frame into a's)."""
    return invert_se3(cam2world_a) @ cam2world_b


def anchor_cameras(cam2world: Float[Tensor, "B S 4 4"]) -> Float[Tensor, "B S 4 4"]:
    """Cameras in the frame of their first view, so that ``cam2world[:, 0]`` is the identity."""
    return invert_se3(cam2world[:, :1]) @ cam2world
