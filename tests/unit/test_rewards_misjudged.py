"""For each reward beyond the paper, a clip that the paper's two rewards like as well as the right one, and it does not.
(A warping wall and a melting object: `test_rewards_rigidity.py`.)"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from boxroom import clips

from vggrpo.geometry import GeometryPrediction
from vggrpo.rewards import (
    RewardContext,
    camera_adherence,
    camera_motion_hinge,
    camera_motion_smoothness,
    camera_travel,
    geometry_reprojection_consistency,
    subject_presence_hinge,
    subject_share,
)
from vggrpo.world import sample_batch
from vggrpo.world.batch import render_scenes
from vggrpo.world.scene import sample_scene


def papers_loss(right: GeometryPrediction, wrong: GeometryPrediction) -> float:
    """By how much the paper's rewards, summed, prefer the right clip."""
    values = [
        reward(clip, **options).value.item()
        for clip in (right, wrong)
        for reward, options in ((camera_motion_smoothness, {}), (geometry_reprojection_consistency, {"movers": "none"}))
    ]
    return values[0] + values[1] - values[2] - values[3]


def test_a_camera_that_stands_still_where_the_base_model_moves() -> None:
    moving, still = clips(["truck"]), clips(["still"])
    assert papers_loss(moving, still) == pytest.approx(0, abs=1e-3)
    context = RewardContext(base_travel=camera_travel(moving))
    assert camera_motion_hinge(moving, context=context).value.item() == 0
    assert camera_motion_hinge(still, context=context).value.item() == pytest.approx(-1)


def test_a_camera_that_goes_the_other_way() -> None:
    right, wrong = (
        sample_batch([3], size=(32, 32), camera=move, shake="smooth", supersample=1).geometry()
        for move in ("pan_left", "pan_right")
    )
    context = RewardContext(["The camera pans left."])
    assert abs(papers_loss(right, wrong)) < 0.01
    assert camera_adherence(right, context=context).value > 0.9
    assert camera_adherence(wrong, context=context).value < -0.9


def test_a_room_whose_objects_are_gone() -> None:
    scene = next(scene for scene in map(sample_scene, range(100)) if (scene.shape >= 0).all() and not scene.handheld)
    empty = replace(scene, shape=np.full_like(scene.shape, -1))
    full, bare = (render_scenes([each], size=(32, 32), supersample=1).geometry(4) for each in (scene, empty))
    assert subject_share(full).item() > 0.02 and subject_share(bare).item() == 0
    assert papers_loss(full, bare) < 0.01  # if anything, they like the empty room better
    context = RewardContext(base_subjects=subject_share(full))
    assert subject_presence_hinge(full, context=context).value.item() == pytest.approx(0, abs=1e-6)
    assert subject_presence_hinge(bare, context=context).value.item() == pytest.approx(-1)


def test_what_is_compared_has_geometry_to_judge() -> None:
    for clip in (clips(["truck"]), clips(["still"])):
        assert torch.cat([camera_motion_smoothness(clip).valid, geometry_reprojection_consistency(clip).valid]).all()
