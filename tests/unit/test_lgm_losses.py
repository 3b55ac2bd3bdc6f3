"""Errors and losses of geometry: what the target does not know counts nowhere; where it knows all, nothing changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vggrpo.geometry import GeometryPrediction
from vggrpo.geometry.se3 import so3_exp
from vggrpo.lgm.cache import pack_geometry
from vggrpo.lgm.losses import distillation_loss, geometry_errors, geometry_loss

QUARTER = (slice(None), slice(None), slice(0, 4), slice(0, 4))  # of an 8 x 8 map


def geometry(seed: int, clips: int = 2) -> GeometryPrediction:
    """Two views of random depth, flow and masks, all known."""
    draw = torch.Generator().manual_seed(seed)
    shape = (clips, 2, 8, 8)
    poses = torch.eye(4).repeat(clips, 2, 1, 1)
    poses[:, 1, :3, :3] = so3_exp(0.1 * torch.randn(clips, 3, generator=draw))
    poses[:, 1, :3, 3] = 0.3 * torch.randn(clips, 3, generator=draw)
    camera = torch.tensor([[8.0 + seed, 0, 4], [0, 8.0 + seed, 4], [0, 0, 1]]).expand(clips, 2, 3, 3)
    moves = torch.rand(shape, generator=draw) < 0.5
    flow = torch.randn(*shape, 3, generator=draw) * moves[..., None]
    depth = 20 + torch.rand(shape, generator=draw)
    return GeometryPrediction.from_depth(poses, camera, depth, scene_flow=flow, dynamic_mask=moves)


def with_holes(whole: GeometryPrediction) -> GeometryPrediction:
    """As a teacher says it that knows nothing of the first quarter, packed into a cache and read again."""
    conf = whole.conf.clone()
    conf[QUARTER] = 0
    depth = whole.depth.clone()
    depth[QUARTER] = torch.nan
    rows = pack_geometry(replace(whole, depth=depth, conf=conf))
    rows = {name: value.float() if value.is_floating_point() else value for name, value in rows.items()}
    return GeometryPrediction.from_depth(**rows)


def test_a_target_with_holes_finds_no_error_in_an_exact_prediction() -> None:
    whole = geometry(0)
    errors = geometry_errors(whole, with_holes(whole))
    for name in ("abs_rel", "translation", "rotation", "fov", "flow"):
        assert errors[name].abs().max() < 2e-3, name  # the cache holds maps in float16
    assert (errors["dynamic_iou"] == 1).all()


def test_what_is_said_of_holes_counts_nowhere() -> None:
    truth, guess = with_holes(geometry(0)), geometry(1)
    wild = replace(guess, depth=guess.depth.clone(), scene_flow=guess.scene_flow.clone())
    wild.depth[QUARTER] *= 50
    wild.scene_flow[QUARTER] = 1e3
    wild.dynamic_mask = guess.dynamic_mask.clone()
    wild.dynamic_mask[QUARTER] = ~wild.dynamic_mask[QUARTER]
    calm, odd = geometry_errors(guess, truth), geometry_errors(wild, truth)
    assert all(torch.equal(calm[name], odd[name]) for name in calm)
    told = truth.scene_flow.clone()
    told[QUARTER] = torch.nan
    assert geometry_errors(guess, replace(truth, scene_flow=told))["flow"].isfinite().all()


def test_a_target_that_knows_all_is_judged_as_ever_to_the_last_bit() -> None:
    mine, truth = geometry(1), geometry(0)
    unit = truth.depth[:, 0].flatten(1).median(1).values
    want = truth.depth / unit[:, None, None, None]
    ratio = (want / mine.depth).flatten(1).median(1).values
    errors = geometry_errors(mine, truth)
    assert torch.equal(
        errors["abs_rel"], ((mine.depth * ratio[:, None, None, None] - want).abs() / want).flatten(1).mean(1)
    )
    flow = truth.scene_flow / unit[:, None, None, None, None]
    moving = flow.norm(dim=-1) > 1e-6
    miss = (mine.scene_flow * ratio[:, None, None, None, None] - flow).norm(dim=-1) * moving
    assert torch.equal(errors["flow"], miss.flatten(1).sum(1) / moving.flatten(1).sum(1))
    both, either = mine.dynamic_mask & truth.dynamic_mask, mine.dynamic_mask | truth.dynamic_mask
    assert torch.equal(errors["dynamic_iou"], both.flatten(1).sum(1) / either.flatten(1).sum(1))

    _, parts = geometry_loss(mine, {"conf_logit": torch.zeros_like(mine.depth)}, truth)
    off = mine.depth.log() - truth.depth.log()
    assert torch.equal(parts["slope"], off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean())
    miss, moving = (mine.scene_flow - truth.scene_flow).abs().sum(-1), (truth.scene_flow.abs().sum(-1) > 1e-6).float()
    assert torch.equal(parts["flow"], miss.mean() + (miss * moving).sum() / moving.sum())


def test_a_clip_of_which_nothing_is_known_is_no_number_and_stops_no_training() -> None:
    mine, truth = geometry(1), geometry(0)
    truth.conf = torch.stack([torch.zeros_like(truth.conf[0]), truth.conf[1]])
    errors = geometry_errors(mine, truth)
    for name in ("abs_rel", "translation", "flow", "dynamic_iou"):
        assert errors[name].isnan().tolist() == [True, False], name
    assert distillation_loss(mine, {}, truth)[0].isfinite()
    truth.conf[0, 1] = 1  # it fades in: the second view gives the unit
    assert geometry_errors(mine, truth)["abs_rel"].isfinite().all()


@pytest.mark.parametrize("unknown", ["conf", "flow"])
def test_holes_are_no_target_of_a_loss(unknown: str) -> None:
    whole = geometry(0)
    teacher = with_holes(whole)
    if unknown == "flow":  # known depth, unknown flow
        teacher = replace(whole, scene_flow=teacher.scene_flow.clone())
        teacher.scene_flow[QUARTER] = torch.nan
    mine = geometry(1)
    depth, flow = mine.depth.requires_grad_(), mine.scene_flow.clone()
    flow[QUARTER] = 7.0
    guess = replace(GeometryPrediction.from_depth(mine.cam2world, mine.intrinsics, depth), scene_flow=flow)
    guess.scene_flow.requires_grad_()
    loss, parts = distillation_loss(guess, {}, teacher)
    loss.backward()
    assert (guess.scene_flow.grad[QUARTER] == 0).all() and guess.scene_flow.grad.abs().sum() > 0
    assert (depth.grad[QUARTER] == 0).all() == (unknown == "conf")
    # Nor do they make the pixels that move fewer in proportion: the mean over those that are known to.
    still = replace(guess, scene_flow=flow.clone())
    still.scene_flow[QUARTER] = 0
    assert distillation_loss(still, {}, teacher)[1]["flow"] == parts["flow"]
