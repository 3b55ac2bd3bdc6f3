"""Camera smoothness, travel and hinge: hand-computed answers, named weaknesses, invalid clips, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from boxroom import clips
from torch.autograd import gradcheck

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction, so3_exp
from vggrpo.rewards import RewardContext, camera_motion_hinge, camera_motion_smoothness, camera_travel


def with_path(centres: torch.Tensor, turns: torch.Tensor | None = None, depth: float = 2.0) -> GeometryPrediction:
    """A clip whose cameras sit at `centres` (S, 3) with rotation vectors `turns` (S, 3), before a wall."""
    views = centres.shape[0]
    rotation = so3_exp(torch.zeros_like(centres) if turns is None else turns)
    bottom = torch.tensor([0.0, 0, 0, 1]).to(centres).expand(views, 1, 4)
    cam2world = torch.cat([torch.cat([rotation, centres[..., None]], -1), bottom], -2)[None]
    intrinsics = torch.tensor([[4.0, 0, 2], [0, 4, 2], [0, 0, 1]]).to(centres).expand(1, views, 3, 3)
    return GeometryPrediction.from_depth(cam2world, intrinsics, torch.full((1, views, 4, 4), depth).to(centres))


def along_x(*positions: float) -> torch.Tensor:
    return torch.tensor(positions, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0, 0], dtype=torch.float64)


def test_known_answer() -> None:
    # v = 1, 2, -1: |a| = 1, 3; |v| + |v'| = 3, 3; eps = 1e-3 * 2.
    reward = camera_motion_smoothness(with_path(along_x(0, 1, 3, 2), turns=along_x(0, 0.1, 0.2, 0.2)))
    e_trans = (1 / 3.002 + 3 / 3.002) / 2
    e_rot = (0 / 0.201 + 0.1 / 0.101) / 2
    assert reward.terms["e_trans"].item() == pytest.approx(e_trans)
    assert reward.terms["e_rot"].item() == pytest.approx(e_rot)
    assert reward.value.item() == pytest.approx(0.5 * (1 / (1 + e_trans) + 1 / (1 + e_rot)))
    assert reward.terms["travel"].item() == pytest.approx(4 / 2 + 0.2)
    assert reward.terms["largest_step"].item() == pytest.approx(1.0)
    assert reward.terms["largest_turn"].item() == pytest.approx(0.1)


def test_constant_speed_is_perfect_and_a_still_camera_too_which_is_why_travel_is_reported() -> None:
    for path in (along_x(0, 1, 2, 3), along_x(0, 0, 0, 0)):
        assert camera_motion_smoothness(with_path(path)).value.item() == pytest.approx(1)
    teleport = camera_motion_smoothness(with_path(along_x(*[0] * 10, *[5] * 10)))
    assert teleport.value.item() > 0.9 and teleport.terms["largest_step"].item() == pytest.approx(2.5)


def test_eps_forgives_the_noise_of_a_still_camera() -> None:
    noise = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = with_path(1e-4 * noise, turns=1e-5 * noise)
    assert camera_motion_smoothness(path).value > 0.9
    assert camera_motion_smoothness(path, eps_translation=1e-9, eps_rotation=1e-9).value < 0.7


def test_scale_and_unequal_spacing_do_not_matter() -> None:
    a = camera_motion_smoothness(with_path(along_x(0, 1, 3, 2)))
    b = camera_motion_smoothness(with_path(7 * along_x(0, 1, 3, 2), depth=14.0))
    torch.testing.assert_close(a.value, b.value)
    dropped = with_path(along_x(0, 1, 2, 4, 5))
    assert camera_motion_smoothness(dropped).value < 0.95
    dropped.frame_index = torch.tensor([0, 4, 8, 16, 20])
    assert camera_motion_smoothness(dropped).value.item() == pytest.approx(1)
    dropped.frame_index = torch.tensor([0, 4, 4, 16, 20])
    with pytest.raises(ValueError, match="frame_index"):
        camera_motion_smoothness(dropped)


def test_clips_that_cannot_be_judged_are_invalid_not_numbers_and_send_no_gradient() -> None:
    batch = clips(["truck", "truck", "truck", "orbit"], views=4, size=(6, 6)).to(dtype=torch.float32)
    cameras = batch.cam2world.clone()
    cameras[0, 2, 0, 3] = math.nan
    batch.depth[1, 0, 3, 3] = math.inf
    batch.conf[2] = 0
    batch.depth[3, 1, 0, 0], batch.conf[3, 1, 0, 0] = math.nan, 0  # the model itself called this pixel invalid
    batch.cam2world = cameras.requires_grad_()
    reward = camera_motion_smoothness(batch)
    assert reward.valid.tolist() == [False, False, False, True]
    assert reward.value.isnan().tolist() == [True, True, True, False]
    assert camera_travel(batch).isnan().tolist() == [True, True, True, False]
    reward.value[reward.valid].sum().backward()
    assert cameras.grad is not None and cameras.grad.isfinite().all() and (cameras.grad[:3] == 0).all()
    for views in (1, 2):
        assert camera_motion_smoothness(clips(["truck"], views=views)).valid.tolist() == [False]


def test_a_batch_is_its_clips() -> None:
    batch = clips(["truck", "pan", "orbit"], size=(8, 8))
    together = camera_motion_smoothness(batch)
    for i in range(3):
        torch.testing.assert_close(camera_motion_smoothness(batch.index(i)).value[0], together.value[i])


@pytest.mark.parametrize("function", [camera_travel, lambda p: camera_motion_smoothness(p).value])
def test_gradcheck_and_finite_gradients_of_a_still_camera(function) -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    turns = torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    assert gradcheck(lambda c, t: function(with_path(c, t)), (centres, turns))
    still, level = (torch.zeros(4, 3, requires_grad=True) for _ in range(2))
    function(with_path(still, level)).sum().backward()
    assert still.grad is not None and still.grad.isfinite().all()
    assert level.grad is not None and level.grad.isfinite().all()


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    batch = clips(["orbit"], size=(8, 8)).to(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reward = camera_motion_smoothness(batch)
    assert reward.value.dtype == torch.float32
    torch.testing.assert_close(reward.value, camera_motion_smoothness(batch.to(dtype=torch.float32)).value)


def test_hinge_costs_only_what_falls_short_of_the_base_model() -> None:
    slow, fast, fixed = (with_path(along_x(0, s, 2 * s)) for s in (0.1, 2.0, 0.0))
    prompts = ("the camera trucks right",)
    context = RewardContext(prompts, base_travel={prompts[0]: 1.0})
    assert camera_motion_hinge(fast, context=context).value.item() == 0
    reward = camera_motion_hinge(slow, context=context)
    assert reward.value.item() == pytest.approx(-0.9) and reward.terms["travel_ratio"].item() == pytest.approx(0.1)
    assert camera_motion_hinge(slow, context=context, keep=0.8).value.item() == pytest.approx(-0.7)
    assert camera_motion_hinge(fixed, context=RewardContext(base_travel=torch.tensor([0.01]))).value.item() == 0
    with pytest.raises(UserError, match="RewardContext"):
        camera_motion_hinge(slow)
    with pytest.raises(UserError, match="lacks 'another'"):
        camera_motion_hinge(slow, context=RewardContext(("another",), base_travel={prompts[0]: 1.0}))
    with pytest.raises(UserError, match="one number a clip"):
        camera_motion_hinge(slow, context=RewardContext((), base_travel={}))
