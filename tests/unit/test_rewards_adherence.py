"""Camera adherence: whether the true cameras of rendered clips are said to follow it."""

from __future__ import annotations

import pytest
import torch
from boxroom import clips
from torch.autograd import gradcheck

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction, so3_exp
from vggrpo.rewards import RewardContext, camera_adherence
from vggrpo.rewards.adherence import net_motion
from vggrpo.world import CAMERA_MOVES, sample_batch
from vggrpo.world.captions import CAMERA_PHRASES

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "in": "out", "out": "in"}


@pytest.mark.parametrize("move", CAMERA_MOVES)
def test_true_cameras_follow_their_caption_and_not_its_opposite(move):
    batch = sample_batch([3, 4], size=(16, 16), camera=move, shake="smooth", supersample=1)
    geometry = batch.geometry()
    right = camera_adherence(geometry, context=RewardContext(batch.captions))
    assert right.valid.all() and (right.value > 0.9).all()
    if move == "fixed":
        other = camera_adherence(geometry, context=RewardContext(["the camera pans left"] * 2))
        torch.testing.assert_close(other.value, torch.zeros(2))
        return
    kind, _, way = move.partition("_")
    against = f"{kind}_{OPPOSITE[way]}"
    wrong = camera_adherence(geometry, context=RewardContext([f"The camera {CAMERA_PHRASES[against][0]}."] * 2))
    assert (wrong.value < -0.9).all()
    fixed = camera_adherence(geometry, context=RewardContext(["a static shot"] * 2))
    assert (fixed.value < 0.5).all() and (fixed.value > 0).all()


def test_of_two_named_moves_both_are_asked_for():
    both, one = (sample_batch([5], size=(16, 16), camera=c, shake="smooth", supersample=1).geometry()
                 for c in ("dolly_in+pan_left", "dolly_in"))  # fmt: skip
    context = RewardContext(["the camera dollies in and pans left"])
    full, half = (camera_adherence(g, context=context).value.item() for g in (both, one))
    assert full > 0.9 and half == pytest.approx(0.5, abs=0.1)


def test_what_cannot_be_compared_is_invalid():
    room = clips(["truck", "truck", "truck", "truck"])
    room.depth[3] = torch.nan
    prompts = ["a dog", "the camera dollies in, then dollies out", "the camera trucks right", "the camera trucks right"]
    reward = camera_adherence(room, context=RewardContext(prompts))
    assert reward.valid.tolist() == [False, False, True, False]
    assert reward.value.isnan().tolist() == [True, True, False, True]
    single = camera_adherence(clips(["truck"], views=1), context=RewardContext(prompts[2:3]))
    assert not single.valid.any()
    with pytest.raises(UserError, match="one prompt a clip"):
        camera_adherence(room)


def test_a_zoom_asks_for_a_dolly_and_an_orbit_without_a_direction_for_nothing():
    dolly = sample_batch([5], size=(16, 16), camera="dolly_in", shake="smooth", supersample=1).geometry()
    zoom, both, orbit = (
        camera_adherence(dolly, context=RewardContext([prompt]))
        for prompt in ("a garden, zoom in", "the camera zooms in and dollies in", "the camera orbits around a vase")
    )
    assert zoom.value.item() == both.value.item() > 0.9
    assert not orbit.valid.any()


def test_gradcheck_also_of_a_still_camera():
    room = clips(["orbit", "still", "truck"], views=3, size=(6, 6))
    # Uneven, because the median of equal depths has no derivative; the still camera is nudged off the kink of a norm.
    generator = torch.Generator().manual_seed(0)
    offset = (0.01 * torch.randn(3, 3, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    context = RewardContext(["the camera orbits right", "the camera is fixed", "the camera glides right and tilts up"])

    def value(offset):
        turned = room.cam2world[..., :3, :3] @ so3_exp(offset[..., :3])
        top = torch.cat([turned, room.cam2world[..., :3, 3:] + offset[..., 3:, None]], -1)
        cameras = torch.cat([top, room.cam2world[..., 3:, :]], -2)
        prediction = GeometryPrediction.from_depth(cameras, room.intrinsics, room.depth)
        return camera_adherence(prediction, context=context).value

    assert gradcheck(value, (offset,))
    still = torch.zeros(3, 3, 6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(still).sum(), still)
    assert gradient.isfinite().all()


def test_net_motion_reads_steps_in_the_cameras_own_axes():
    quarter = so3_exp(torch.tensor([0.0, torch.pi / 2, 0.0]))
    cameras = torch.eye(4).repeat(1, 3, 1, 1)
    cameras[0, 1:, :3, :3] = quarter
    cameras[0, 2, 0, 3] = 2.0  # looking right, it goes right in the world: ahead in its own axes
    torch.testing.assert_close(
        net_motion(cameras, torch.tensor([2.0])), torch.tensor([[0.0, 0, 1, 0, torch.pi / 2]]), atol=1e-5, rtol=0
    )
