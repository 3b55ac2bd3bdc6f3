"""Epipolar geometry: true matches lie on their lines, a known distance, gradients."""

from __future__ import annotations

import torch
from boxroom import clips
from torch.autograd import gradcheck

from vggrpo.geometry import (
    epipolar_lines,
    essential_from_cameras,
    fundamental_from_cameras,
    pixel_grid,
    project,
    sampson_distance,
)


def matches(move: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """F from view 0 to view 2 of a clip, and true matches of all pixels."""
    room = clips([move], views=3, size=(12, 16))
    fundamental = fundamental_from_cameras(
        room.cam2world[:, 0], room.intrinsics[:, 0], room.cam2world[:, 2], room.intrinsics[:, 2]
    )
    there, _ = project(room.points[:, 0].flatten(1, 2), room.intrinsics[:, 2:], room.cam2world[:, 2:])
    return fundamental, pixel_grid(12, 16, dtype=torch.float64).reshape(1, -1, 2), there[:, 0]


def test_true_matches_of_a_static_scene_have_no_distance() -> None:
    for move in ("truck", "dolly", "orbit"):
        fundamental, here, there = matches(move)
        assert sampson_distance(fundamental, here, there).max() < 1e-9


def test_a_step_off_the_line_of_a_sideways_move_counts_by_both_images() -> None:
    fundamental, here, there = matches("truck")
    # For a pure sideways move lines are rows; a 1 px error shared by both images is 1 / sqrt(2) px.
    off = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        sampson_distance(fundamental, here, there + off), torch.full((1, 192), 0.5**0.5).double()
    )
    torch.testing.assert_close(
        sampson_distance(fundamental, here, there + off), sampson_distance(7 * fundamental, here, there + off)
    )
    lines = epipolar_lines(fundamental, here)
    torch.testing.assert_close(lines[..., 0], torch.zeros_like(lines[..., 0]))


def test_a_batch_is_its_pairs_and_a_pure_rotation_says_nothing() -> None:
    parts = [matches(move) for move in ("truck", "orbit")]
    stacked = sampson_distance(*(torch.cat(part) for part in zip(*parts, strict=True)))
    for row, part in zip(stacked, parts, strict=True):
        torch.testing.assert_close(row, sampson_distance(*part)[0])
    room = clips(["pan"], views=2)
    assert essential_from_cameras(room.cam2world[:, 0], room.cam2world[:, 1]).abs().max() < 1e-12
    assert sampson_distance(torch.zeros(1, 3, 3), torch.rand(1, 4, 2), torch.rand(1, 4, 2)).isnan().all()


def test_gradcheck() -> None:
    fundamental, here, there = matches("orbit")
    inputs = fundamental, here[:, :5], there[:, :5] + 0.7
    assert gradcheck(sampson_distance, tuple(t.clone().requires_grad_() for t in inputs))
