"""Reprojection consistency: exact geometry is free, wobble ranks, masks hold, and nothing valid is not a number."""

from __future__ import annotations

import math

import pytest
import torch
from boxroom import MOVES, SIZE, clips, wobble
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction, so3_exp
from vggrpo.rewards import geometry_reprojection_consistency as consistency
from vggrpo.rewards import reprojection


def walls(*depths: float, **options: object) -> GeometryPrediction:
    """Views from one place, each of which sees a wall at another distance."""
    depth = torch.tensor(depths, dtype=torch.float64)[None, :, None, None].expand(1, -1, 8, 8).clone()
    cameras = torch.eye(4, dtype=torch.float64).expand(1, len(depths), 4, 4)
    intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]], dtype=torch.float64).expand(1, len(depths), 3, 3)
    return GeometryPrediction.from_depth(cameras, intrinsics, depth, **options)


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def test_known_answers_of_two_walls() -> None:
    # The nearer wall stands in front of the other, which is charged; behind the nearer one it is hidden. Median 2.
    far = consistency(walls(2.0, 2.2), per_view=True)
    torch.testing.assert_close(far.terms["e_geo_per_view"], torch.tensor([[0.0, 0.1]]).double())
    assert far.terms["e_geo"].item() == pytest.approx(0.05) and far.value.item() == pytest.approx(1 / 1.05)
    # Within the tolerance both are seen, and each pixel holds one residual of 0 and one of .01.
    near = consistency(walls(2.0, 2.01), per_view=True)
    torch.testing.assert_close(near.terms["e_geo_per_view"], torch.tensor([[0.0025, 0.0025]]).double())
    # Without the own points both directions are charged, as far as the other view sees the point at all.
    alone = consistency(walls(2.0, 2.01), leave_one_out=True, per_view=True)
    torch.testing.assert_close(alone.terms["e_geo_per_view"], torch.tensor([[0.005, 0.005]]).double())


def test_worst_views_decide() -> None:
    five = walls(2.0, 2.2, 2.2, 2.2, 2.2)
    assert consistency(five).terms["e_geo"].item() == pytest.approx(0.2 / 2.2)
    assert consistency(five, worst_views=5).terms["e_geo"].item() == pytest.approx(0.8 * 0.2 / 2.2)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_exact_geometry_is_free_for_every_move_and_does_not_pay_for_standing_still(leave_one_out: bool) -> None:
    parts = [clips(list(MOVES), start=start) for start in (-0.6, 0.0, 0.5)]
    errors = []
    for part in parts:
        reward = consistency(part.to(dtype=torch.float32), leave_one_out=leave_one_out)
        assert reward.valid.all() and (reward.terms["held"] > 0.6).all()
        errors.append(reward.terms["e_geo"])
    assert torch.cat(errors).max() < 1e-3
    assert torch.cat(errors).mean() < 1e-4
    # What remains is a tenth of what a wobble of a quarter pixel costs, so no ranking of it can matter to a group.
    quarter = consistency(wobble(parts[1], 0.25, "depth"), leave_one_out=leave_one_out).terms["e_geo"]
    assert torch.cat(errors).max() < 0.2 * quarter.min()


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("kind", ["depth", "points", "cameras"])
def test_wobble_ranks(kind: str, leave_one_out: bool) -> None:
    room = clips(list(MOVES) if kind == "depth" else list(MOVES)[::2])
    levels = [0.0, 0.5, 1.0, 2.0, 4.0]
    errors = torch.stack(
        [consistency(wobble(room, pixels, kind), leave_one_out=leave_one_out).terms["e_geo"] for pixels in levels]
    )
    assert (errors.diff(dim=0) > 0).all()
    assert (errors[-1] > (1.5 if leave_one_out else 2.5) * errors[2]).all()


def test_a_cut_between_two_places_costs_more_than_a_wobble() -> None:
    here, there = clips(["truck"], start=-0.6), clips(["dolly"], start=0.5)
    depth = torch.cat([here.depth[:, :3], there.depth[:, 3:]], 1)
    glued = GeometryPrediction.from_depth(here.cam2world, here.intrinsics, depth)
    assert consistency(glued).terms["e_geo"] > consistency(wobble(here, 1.0, "depth")).terms["e_geo"]


def test_what_lies_behind_is_hidden_and_what_lies_in_front_is_charged_in_full() -> None:
    small, large = (consistency(walls(2.0, 2.0, 2.0, far), worst_views=1).terms["e_geo"].item() for far in (2.5, 4.0))
    assert small == pytest.approx(0.25) and large == pytest.approx(1.0)


def test_a_moving_object_costs_nothing_when_masked() -> None:
    room = clips(["truck"])
    depth = room.depth.clone()
    mask = torch.zeros_like(depth, dtype=torch.bool)
    for view in range(5):
        mask[:, view, 10:20, 8 + 6 * view : 20 + 6 * view] = True
    depth[mask] = 0.8
    prediction = GeometryPrediction.from_depth(room.cam2world, room.intrinsics, depth)
    assert consistency(prediction).terms["e_geo"] > 0.02
    prediction.dynamic_mask = mask
    assert consistency(prediction).terms["e_geo"] < 1e-3
    prediction.dynamic_mask, prediction.subject_mask = None, mask
    assert consistency(prediction, movers="subject").terms["e_geo"] < 1e-3
    assert consistency(prediction, movers="none").terms["e_geo"] > 0.02
    flow = torch.zeros_like(prediction.points)
    flow[mask] = 0.3
    prediction.scene_flow = flow
    masked = consistency(prediction, per_view=True)
    assert masked.terms["e_geo"] < 1e-3 and masked.terms["e_geo_per_view"][0, -1].isnan()
    prediction.subject_mask = None
    with pytest.raises(UserError, match="subject mask"):
        consistency(prediction, movers="subject")
    with pytest.raises(UserError, match="movers"):
        consistency(prediction, movers="everything")


def test_low_confidence_pixels_are_left_out() -> None:
    room = wobble(clips(["truck"]), 4.0, "depth")
    exact = clips(["truck"])
    top = torch.zeros(SIZE, dtype=torch.bool)
    top[:32] = True
    conf = torch.where(top, 0.05, 0.9).double().expand_as(room.depth)
    mixed = torch.where(top, room.depth, exact.depth)
    trusted = GeometryPrediction.from_depth(room.cam2world, room.intrinsics, mixed, conf)
    reward = consistency(trusted)
    assert reward.terms["e_geo"] < 1e-3 and reward.terms["static"] < 0.5
    assert consistency(trusted, confidence_threshold=0.01).terms["e_geo"] > 0.01


def test_clips_that_cannot_be_judged_are_invalid_not_numbers_and_send_no_gradient() -> None:
    batch = clips(["truck"] * 7, views=3, size=(16, 16)).to(dtype=torch.float32)
    depth, cameras = batch.depth.clone(), batch.cam2world.clone()
    depth[0, 1, 4, 4] = math.nan
    cameras[1, 2, 0, 0] = math.inf
    dynamic = torch.zeros_like(depth, dtype=torch.bool)
    dynamic[2] = True
    conf = torch.ones_like(depth)
    conf[3] = 0
    cameras[4, 1, :3, :3], cameras[4, 2, :3, :3] = (
        torch.diag(torch.tensor([-1.0, 1, -1])),
        so3_exp(torch.tensor([1.6, 0, 0])),
    )
    depth[5, 0, 0, 0], conf[5, 0, 0, 0] = math.nan, 0  # the model itself called this pixel invalid
    leaves = [depth.requires_grad_(), cameras.requires_grad_()]
    prediction = GeometryPrediction.from_depth(cameras, batch.intrinsics, depth, conf, dynamic_mask=dynamic)
    reward = consistency(prediction)
    assert reward.valid.tolist() == [False] * 5 + [True] * 2
    for number in (reward.value, reward.terms["e_geo"], reward.terms["held"]):
        assert number.isnan().tolist() == [True] * 5 + [False] * 2
    reward.value[reward.valid].sum().backward()
    assert leaves[1].grad is not None and leaves[1].grad.isfinite().all()
    assert leaves[0].grad is not None and leaves[0].grad[6].isfinite().all() and (leaves[0].grad[2:4] == 0).all()


def test_one_view_is_invalid() -> None:
    assert consistency(clips(["truck"], views=1)).valid.tolist() == [False]
    assert consistency(clips(["truck"], views=2)).valid.tolist() == [True]


def test_a_batch_is_its_clips_and_stride_thins_the_cloud() -> None:
    room = wobble(clips(["truck", "pan", "orbit"]), 2.0, "depth")
    together = consistency(room)
    for i in range(3):
        torch.testing.assert_close(consistency(room.index(i)).value[0], together.value[i])
    thinned = consistency(room, stride=2)
    torch.testing.assert_close(thinned.terms["e_geo"], together.terms["e_geo"], rtol=0.35, atol=0)
    assert consistency(clips(list(MOVES)), stride=2).terms["e_geo"].max() < 1e-3


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_the_unit_of_length_and_the_world_frame_do_not_matter(seed: int, unit: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    room = wobble(clips(["orbit"], views=3, size=(24, 24)), 1.0, "cameras", seed)
    frame = torch.eye(4, dtype=torch.float64)
    frame[:3, :3] = so3_exp(torch.randn(3, generator=generator, dtype=torch.float64))
    frame[:3, 3] = torch.randn(3, generator=generator, dtype=torch.float64)
    cameras = frame @ room.cam2world
    cameras[..., :3, 3] *= unit
    other = GeometryPrediction.from_depth(cameras, room.intrinsics, room.depth * unit)
    torch.testing.assert_close(consistency(other).value, consistency(room).value, rtol=1e-6, atol=1e-6)


def test_gradcheck() -> None:
    room = wobble(clips(["orbit"], views=3, size=(5, 5)), 0.3, "cameras")
    options = {"edge_threshold": 1e3, "edge_radius": 0, "tolerance": 0.2, "min_overlap": 0.0}
    generator = torch.Generator().manual_seed(0)
    # Uneven, because the median of equal depths has no derivative.
    room.depth = room.depth * (1 + 0.01 * torch.rand(room.depth.shape, generator=generator, dtype=torch.float64))
    offset = (0.01 * torch.randn(1, 3, 6, generator=generator, dtype=torch.float64)).requires_grad_()

    def from_depth(depth: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Cameras move on SE(3): a matrix that stops being a rotation would move a view's own points off its pixels."""
        turned = room.cam2world[..., :3, :3] @ so3_exp(offset[..., :3])
        top = torch.cat([turned, room.cam2world[..., :3, 3:] + offset[..., 3:, None]], -1)
        cameras = torch.cat([top, room.cam2world[..., 3:, :]], -2)
        return consistency(GeometryPrediction.from_depth(cameras, room.intrinsics, depth), **options).value

    assert gradcheck(from_depth, (room.depth.clone().requires_grad_(), offset), fast_mode=True)

    def from_points(points: torch.Tensor) -> torch.Tensor:
        prediction = GeometryPrediction(room.cam2world, room.intrinsics, room.depth, points, room.conf)
        return consistency(prediction, leave_one_out=True, **options).value

    assert gradcheck(from_points, (room.points.clone().requires_grad_(),), fast_mode=True)


def test_descending_the_error_mends_a_camera() -> None:
    exact = clips(["truck"], views=3, size=(32, 32))
    turn = torch.zeros(3, 3, dtype=torch.float64)
    turn[1] = torch.tensor([0.0, 0.02, 0.01])
    turn.requires_grad_()
    before = None
    for _ in range(25):
        cameras = exact.cam2world.clone()
        cameras = torch.cat(
            [
                torch.cat([exact.cam2world[..., :3, :3] @ so3_exp(turn)[None], cameras[..., :3, 3:]], -1),
                cameras[..., 3:, :],
            ],
            -2,
        )
        e_geo = 1 / consistency(GeometryPrediction.from_depth(cameras, exact.intrinsics, exact.depth)).value.sum() - 1
        before = e_geo.item() if before is None else before
        (gradient,) = torch.autograd.grad(e_geo, turn)
        assert gradient.isfinite().all()
        turn = (turn - 0.002 * gradient / gradient.norm()).detach().requires_grad_()
    assert e_geo.item() < 0.4 * before


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    room = wobble(clips(["truck"], size=(24, 24)), 2.0, "depth").to(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reward = consistency(room)
    assert reward.value.dtype == torch.float32
    torch.testing.assert_close(reward.value, consistency(room.to(dtype=torch.float32)).value)


def test_the_embedded_world_is_consistent_for_every_camera_move() -> None:
    from vggrpo.world import CAMERA_MOVES, sample_batch

    errors, travel = [], []
    for number, move in enumerate(CAMERA_MOVES):
        batch = sample_batch([10 * number], size=SIZE, camera=move, supersample=1)
        reward = consistency(batch.geometry())
        assert reward.valid.all()
        errors.append(reward.terms["e_geo"])
        travel.append(reward.terms["travel"])
    assert torch.cat(errors).max() < 1e-3 and torch.cat(errors).mean() < 1e-4
    assert abs(rank_correlation(torch.cat(errors), torch.cat(travel))) < 0.5


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_views_in_parts_are_views_at_once(monkeypatch: pytest.MonkeyPatch, leave_one_out: bool) -> None:
    room = wobble(clips(list(MOVES)[:2]), 1.0, "depth")

    def seen() -> tuple[torch.Tensor, torch.Tensor]:
        depth = room.depth.clone().requires_grad_(True)
        moved = GeometryPrediction.from_depth(room.cam2world, room.intrinsics, depth)
        reward = consistency(moved, leave_one_out=leave_one_out, per_view=True)
        (gradient,) = torch.autograd.grad(reward.value.sum(), depth)
        return reward.terms["e_geo_per_view"].detach(), gradient

    whole = seen()
    views, points = room.depth.shape[1], room.depth[0].numel()
    for views_at_once in (1, 2):
        monkeypatch.setattr(reprojection, "_PAIRS_AT_ONCE", views_at_once * 2 * points + 1)
        assert views % 2 and views > 2  # the last part is smaller
        for part, expected in zip(seen(), whole, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-15)
