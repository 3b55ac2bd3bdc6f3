"""SE(3): known answers, agreement with the matrix exponential, and finite gradients where naive formulas have none."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from vggrpo.geometry import (
    anchor_cameras,
    hat,
    invert_se3,
    relative_pose,
    rotation_angle,
    safe_norm,
    so3_exp,
    so3_log,
)

AXES = torch.tensor(
    [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.6, 0.8, 0], [0.6, 0, -0.8], [-1 / 3, 2 / 3, 2 / 3]], dtype=torch.float64
)
ANGLES = [0.0, 1e-9, 1e-5, 1e-4, 9.9e-4, 1.1e-3, 0.3, 1.5, math.pi / 2, 3.0, math.pi - 1e-3, math.pi - 1e-7]


def random_poses(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    poses = torch.eye(4, dtype=torch.float64).repeat(*shape, 1, 1)
    poses[..., :3, :3] = so3_exp(torch.randn(*shape, 3, generator=generator, dtype=torch.float64))
    poses[..., :3, 3] = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    return poses


def test_exp_is_the_matrix_exponential() -> None:
    vectors = torch.cat([AXES * angle for angle in ANGLES])
    torch.testing.assert_close(so3_exp(vectors), torch.matrix_exp(hat(vectors)), atol=1e-14, rtol=0)


def test_quarter_turn_about_z_takes_x_to_y() -> None:
    rotation = so3_exp(torch.tensor([0.0, 0.0, math.pi / 2]))
    torch.testing.assert_close(rotation @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("angle", ANGLES)
def test_log_inverts_exp(angle: float) -> None:
    vectors = AXES * angle
    torch.testing.assert_close(so3_log(so3_exp(vectors)), vectors, atol=1e-8, rtol=1e-8)


def test_log_of_half_turns_gives_one_of_the_two_axes() -> None:
    rotation = so3_exp(AXES * math.pi)
    vectors = so3_log(rotation)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.full((6,), math.pi, dtype=torch.float64))
    torch.testing.assert_close(so3_exp(vectors), rotation, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-4, math.pi - 1e-6, math.pi])
def test_log_and_angle_have_finite_gradients_everywhere(angle: float, dtype: torch.dtype) -> None:
    rotation = so3_exp((AXES * angle).to(dtype)).requires_grad_()
    (so3_log(rotation).sum() + rotation_angle(rotation).sum()).backward()
    assert rotation.grad is not None and rotation.grad.isfinite().all()
    assert rotation.grad.abs().max() < 100


def test_exp_and_norm_have_finite_gradients_at_zero() -> None:
    vector = torch.zeros(2, 3, requires_grad=True)
    (so3_exp(vector).sum() + safe_norm(vector).sum()).backward()
    assert vector.grad is not None and vector.grad.isfinite().all()


@pytest.mark.parametrize("angle", [0.0, 0.5, 2.0, 3.1])
def test_gradcheck(angle: float) -> None:
    vectors = (AXES * angle).requires_grad_()
    assert gradcheck(so3_exp, (vectors,))
    rotation = so3_exp(vectors.detach())
    # Along the group: what the logarithm says of matrices that are no rotations is nobody's business.
    turn = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda d: so3_log(rotation @ so3_exp(d)), (turn,))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_rotation_angle_is_symmetric_and_obeys_the_triangle_inequality(seed: int) -> None:
    a, b = random_poses(2, seed=seed)[:, :3, :3]
    torch.testing.assert_close(rotation_angle(a), rotation_angle(a.T), atol=1e-7, rtol=1e-7)
    assert rotation_angle(a @ b) <= rotation_angle(a) + rotation_angle(b) + 1e-7


def test_inverse_relative_and_anchor() -> None:
    poses = random_poses(2, 5)
    identity = torch.eye(4, dtype=torch.float64).expand(2, 5, 4, 4)
    torch.testing.assert_close(invert_se3(poses) @ poses, identity)
    torch.testing.assert_close(poses[:, 0] @ relative_pose(poses[:, 0], poses[:, 3]), poses[:, 3])
    anchored = anchor_cameras(poses)
    torch.testing.assert_close(anchored[:, 0], identity[:, 0])
    torch.testing.assert_close(relative_pose(anchored[:, 1], anchored[:, 4]), relative_pose(poses[:, 1], poses[:, 4]))
