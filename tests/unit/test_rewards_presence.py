"""Share of subjects and the hinge on it: what costs, what does not, invalid clips, and the rule that ends a run."""

from __future__ import annotations

import math

import pytest
import torch
from boxroom import clips
from fake_lgm import fake_lgm
from test_posttraining_trainer import config_for, rows, train

from vggrpo.config import load_config
from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction
from vggrpo.rewards import RewardContext, subject_presence_hinge, subject_share


def with_subjects(*shares: float) -> GeometryPrediction:
    """Clips of 4 views with 10 x 10 pixels, of which these shares are subjects."""
    batch = clips(["truck"] * len(shares), views=4, size=(10, 10))
    batch.subject_mask = torch.zeros_like(batch.depth, dtype=torch.bool)
    for mask, share in zip(batch.subject_mask, shares, strict=True):
        mask.flatten(1)[:, : round(100 * share)] = True
    return batch


def test_only_what_is_missing_costs() -> None:
    batch = with_subjects(0.05, 0.2, 0.3, 0.0)
    assert subject_share(batch).tolist() == pytest.approx([0.05, 0.2, 0.3, 0.0])
    context = RewardContext(base_subjects=torch.tensor([0.2, 0.2, 0.2, 0.2]))
    reward = subject_presence_hinge(batch, context=context)
    assert reward.value.tolist() == pytest.approx([-0.75, 0, 0, -1], abs=1e-6) and reward.valid.all()
    assert reward.terms["share_ratio"].tolist() == pytest.approx([0.25, 1, 1.5, 0], abs=1e-6)
    half = subject_presence_hinge(batch, context=context, keep=0.5)
    assert half.value.tolist() == pytest.approx([-0.25, 0, 0, -0.5], abs=1e-6)


def test_an_empty_room_is_not_furnished() -> None:
    context = RewardContext(("an empty room",), base_subjects={"an empty room": 0.001})
    assert subject_presence_hinge(with_subjects(0.0), context=context).value.item() == 0


def test_broken_geometry_is_invalid_and_so_is_an_unknown_base() -> None:
    batch = with_subjects(0.2, 0.2, 0.2)
    batch.cam2world[0, 2, 0, 3] = math.nan
    reward = subject_presence_hinge(batch, context=RewardContext(base_subjects=torch.tensor([0.2, math.nan, 0.1])))
    assert reward.valid.tolist() == [False, False, True] and reward.value.isnan().tolist() == [True, True, False]


def test_what_it_needs() -> None:
    batch = with_subjects(0.2)
    with pytest.raises(UserError, match="base_subjects"):
        subject_presence_hinge(batch)
    with pytest.raises(UserError, match="base_subjects lacks 'another'"):
        subject_presence_hinge(batch, context=RewardContext(("another",)))
    batch.subject_mask = None
    assert subject_share(batch).isnan().all()
    with pytest.raises(UserError, match="subject mask"):
        subject_presence_hinge(batch, context=RewardContext(base_subjects=torch.tensor([0.2])))
    with pytest.raises(UserError, match=r"rewards\.subject_presence_hinge compares with the base model"):
        load_config({"rewards": {"subject_presence_hinge": 1.0}, "grpo": {"base_travel_samples": 0}})


def vanishing(latents: torch.Tensor) -> GeometryPrediction:
    """Geometry whose subjects are gone as soon as latents differ from those of the base model."""
    prediction = fake_lgm(latents)
    seen = vanishing.__dict__.setdefault("calls", [])
    seen.append(1)
    prediction.subject_mask = torch.zeros_like(prediction.depth, dtype=torch.bool)
    prediction.subject_mask[..., : 12 if len(seen) == 1 else 3] = True  # the first call is the base model's
    return prediction


REWARDS = "rewards={camera_motion_smoothness: 1, geometry_reprojection_consistency: 1, subject_presence_hinge: 0.5}"


def test_training_measures_the_base_model_and_ends_by_rule(tiny_wan_dir, tmp_path, caplog) -> None:
    vanishing.__dict__.pop("calls", None)
    overrides = [REWARDS, "stop.subjects_below=0.5", "stop.memory=1"]
    assert config_for(tiny_wan_dir, tmp_path, overrides).rewards["subject_presence_hinge"].weight == 0.5
    train(tiny_wan_dir, tmp_path, overrides, lgm=vanishing, updates=3)
    (row,) = rows(tmp_path)
    assert row["subject_share_base"] == pytest.approx(0.5) and row["subject_share_ratio"] == pytest.approx(0.25)
    assert row["reward/subject_presence_hinge"] == pytest.approx(-0.75)
    assert "the share of subject pixels relative to the base model is 0.25" in caplog.text
