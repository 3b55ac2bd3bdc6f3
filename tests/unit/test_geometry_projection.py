"""Unprojection, projection, visibility and edges: known answers, round trips, gradients, and a looping reference."""

from __future__ import annotations

import math

import pytest
import torch
from boxroom import MOVES, clips
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from vggrpo.geometry import (
    GeometryPrediction,
    depth_edges,
    pixel_grid,
    point_visibility,
    project,
    so3_exp,
    unproject,
    zbuffer,
    zbuffer_reference,
)


def random_cameras(batch: int, views: int, size: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Intrinsics with skew and unequal focal lengths, and arbitrary poses."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    intrinsics = torch.eye(3, dtype=torch.float64).repeat(batch, views, 1, 1)
    intrinsics[..., 0, 0], intrinsics[..., 1, 1] = (
        size[1] * (0.5 + rand(batch, views)),
        size[0] * (0.5 + rand(batch, views)),
    )
    intrinsics[..., 0, 1] = rand(batch, views)
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = size[1] * (0.4 + 0.2 * rand(batch, views)), size[0] / 2
    poses = torch.eye(4, dtype=torch.float64).repeat(batch, views, 1, 1)
    poses[..., :3, :3], poses[..., :3, 3] = so3_exp(4 * rand(batch, views, 3) - 2), 4 * rand(batch, views, 3) - 2
    return intrinsics, poses


def test_known_answer() -> None:
    intrinsics = torch.tensor([[100.0, 0, 2], [0, 50, 1], [0, 0, 1]]).expand(1, 1, 3, 3)
    cam2world = torch.eye(4).repeat(1, 1, 1, 1)
    cam2world[..., :3, 3] = torch.tensor([1.0, 2, 3])
    points = unproject(torch.full((1, 1, 2, 4), 10.0), intrinsics, cam2world)
    # Pixel (row 1, column 3) has its centre at (3.5, 1.5): ((3.5 - 2) / 100, (1.5 - 1) / 50, 1) * 10 + centre.
    torch.testing.assert_close(points[0, 0, 1, 3], torch.tensor([1.15, 2.1, 13.0]))
    uv, z = project(points.flatten(1, 3), intrinsics, cam2world)
    torch.testing.assert_close(uv[0, 0, -1], torch.tensor([3.5, 1.5]))
    torch.testing.assert_close(z, torch.full((1, 1, 8), 10.0))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_project_inverts_unproject(seed: int) -> None:
    size = (5, 7)
    intrinsics, poses = random_cameras(2, 3, size, seed)
    depth = 0.5 + torch.rand(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    points = unproject(depth, intrinsics, poses)
    for view in range(3):
        one = slice(view, view + 1)
        uv, z = project(points[:, view].flatten(1, 2), intrinsics[:, one], poses[:, one])
        torch.testing.assert_close(uv, pixel_grid(*size, dtype=torch.float64).flatten(0, 1).expand(2, 1, -1, 2))
        torch.testing.assert_close(z.reshape(2, *size), depth[:, view])


def test_a_batch_is_its_clips() -> None:
    intrinsics, poses = random_cameras(3, 2, (4, 4))
    depth = torch.rand(3, 2, 4, 4, dtype=torch.float64) + 0.5
    together = unproject(depth, intrinsics, poses)
    uv, z = project(together.flatten(1, 3), intrinsics, poses)
    for clip in range(3):
        one = slice(clip, clip + 1)
        alone = unproject(depth[one], intrinsics[one], poses[one])
        torch.testing.assert_close(alone, together[one])
        for whole, part in zip((uv, z), project(alone.flatten(1, 3), intrinsics[one], poses[one]), strict=True):
            torch.testing.assert_close(whole[one], part)


def test_gradcheck() -> None:
    intrinsics, poses = random_cameras(1, 2, (2, 3))
    depth = torch.rand(1, 2, 2, 3, dtype=torch.float64) + 0.5
    assert gradcheck(unproject, tuple(t.requires_grad_() for t in (depth, intrinsics, poses)))
    # Points in front of both cameras, so that no placeholder is hit.
    poses = torch.eye(4, dtype=torch.float64).repeat(1, 2, 1, 1).requires_grad_()
    points = torch.rand(1, 5, 3, dtype=torch.float64) + torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    assert gradcheck(project, (points.requires_grad_(), intrinsics.detach().requires_grad_(), poses))


def test_points_behind_the_camera_are_far_outside_and_send_finite_gradients() -> None:
    intrinsics, poses = random_cameras(1, 1, (4, 4))
    poses = torch.eye(4, dtype=torch.float64).expand_as(poses)
    points = torch.tensor(
        [[[0.0, 0, 0], [1.0, 0, -1], [0, 0, 1e-9], [0.0, 0, 2]]], dtype=torch.float64, requires_grad=True
    )
    uv, z = project(points, intrinsics, poses)
    visible = point_visibility(uv, z, (4, 4))
    assert visible.tolist() == [[[False, False, False, True]]]
    uv.sum().backward()
    assert points.grad is not None and points.grad.isfinite().all()


def test_zbuffer_equals_its_reference_and_sends_no_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    uv = torch.rand(2, 3, 60, 2, generator=generator) * 8 - 1
    uv[0, 0, 0] = math.nan
    z = (torch.rand(2, 3, 60, generator=generator) * 4 - 0.5).requires_grad_()
    mask = torch.rand(2, 3, 60, generator=generator) > 0.3
    for chosen in (None, mask):
        fast = zbuffer(uv, z, (5, 6), mask=chosen)
        assert not fast.requires_grad
        torch.testing.assert_close(fast, zbuffer_reference(uv, z, (5, 6), mask=chosen))


def test_visibility_keeps_the_front_and_what_lies_within_the_tolerance() -> None:
    uv = torch.tensor([[[[0.2, 0.2], [0.9, 0.9], [0.5, 0.5], [1.5, 0.5], [2.5, 0.5]]]])
    z = torch.tensor([[[1.0, 1.005, 1.02, 9.0, 1.0]]])
    assert point_visibility(uv, z, (1, 2)).tolist() == [[[True, True, False, True, False]]]
    mask = torch.tensor([[[False, True, True, True, True]]])
    assert point_visibility(uv, z, (1, 2), mask=mask, tolerance=0.05).tolist() == [[[False, True, True, True, False]]]


def test_edges_pass_planes_however_grazing_and_mark_outlines() -> None:
    room = clips(list(MOVES), views=2)
    edges = depth_edges(room.depth, threshold=0.03)
    assert edges.float().mean() < 0.15
    v = pixel_grid(64, 64)[..., 1] - 30.9  # a floor just under the horizon: z = f h / v
    floor = torch.where(v > 0, 60 / v, 5.0)
    below = v > 0
    marked = depth_edges(torch.where(below, floor, torch.zeros_like(floor)), threshold=0.001)
    assert not marked.any()
    jump = torch.full((6, 8), 2.0)
    jump[:, 4:] = 3.0
    assert depth_edges(jump).nonzero()[:, 1].unique().tolist() == [3, 4]
    assert depth_edges(jump, radius=1).nonzero()[:, 1].unique().tolist() == [2, 3, 4, 5]
    corner = torch.full((6, 6), 2.0)
    corner[:3, :3] = 1.0
    assert depth_edges(corner)[2:4, 2:4].tolist() == [[True, True], [True, False]]


def test_prediction_checks_shapes_and_moves_whole() -> None:
    room = clips(["truck", "pan"], views=3, size=(4, 6))
    assert (room.batch_size, room.num_views, room.size) == (2, 3, (4, 6))
    assert room.frame_index is not None and room.frame_index.tolist() == [0, 1, 2]
    half = room.to(dtype=torch.bfloat16)
    assert half.points.dtype == torch.bfloat16 and half.frame_index is not None
    assert half.frame_index.dtype == torch.int64
    assert room.index(-1).depth.shape == (1, 3, 4, 6)
    torch.testing.assert_close(room.index([1]).cam2world, room.cam2world[1:])
    assert not room.index(slice(0, 1)).detach().depth.requires_grad
    again = type(room).cat([room.index([0]), room.index([1])])
    torch.testing.assert_close(again.points, room.points)
    torch.testing.assert_close(again.frame_index, room.frame_index)
    with pytest.raises(ValueError, match=r"intrinsics: expected shape \(2, 3, 3, 3\).*got \(2, 3, 3\)"):
        GeometryPrediction(room.cam2world, room.intrinsics[:, 0], room.depth, room.points, room.conf)
    with pytest.raises(ValueError, match="dynamic_mask: expected dtype"):
        GeometryPrediction.from_depth(room.cam2world, room.intrinsics, room.depth, dynamic_mask=room.conf)
