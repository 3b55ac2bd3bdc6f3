"""Structure from motion on rendered clips: rankings, the worst score, and repeatability."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from vggrpo.evaluation import Clip, Measurement
from vggrpo.evaluation.metrics.sfm import sfm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from calibration_clips import Frames, hard_cut, ken_burns, rendered, wobble

pytest.importorskip("pycolmap", reason="pycolmap (extra sfm) is not installed")

pytestmark = pytest.mark.e2e


def measure(frames: Frames) -> dict[str, Measurement]:
    return sfm(Clip(frames, 8))


def value(found: dict[str, Measurement], name: str) -> float:
    assert found[name].value is not None, found[name].reason
    return float(found[name].value)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def correct() -> Frames:
    return rendered([2], "truck_right")[0]


def test_correct_parallax_is_reconstructed_and_wobble_and_cuts_are_not(correct):
    good = measure(correct)
    assert value(good, "sfm_registered") == 1 and value(good, "sfm_track_length") > 3
    assert value(good, "sfm_reprojection") < 0.002
    for spoilt in (wobble(correct, 1), wobble(correct, 4), hard_cut(correct, rendered([3], "orbit_left")[0])):
        bad = measure(spoilt)
        assert value(bad, "sfm_track_length") < 0.8 * value(good, "sfm_track_length")
        assert value(bad, "sfm_reprojection") > 1.5 * value(good, "sfm_reprojection")


def test_failure_is_the_worst_score(correct):
    rng = np.random.default_rng(0)
    unrelated = [rng.permutation(correct.reshape(-1, 3)).reshape(correct[0].shape[0] * len(correct), -1, 3)[:64]
                 for _ in range(17)]  # fmt: skip
    found = measure(np.stack(unrelated))
    assert value(found, "sfm_registered") == 0 and value(found, "sfm_track_length") == 0
    assert value(found, "sfm_reprojection") == pytest.approx(2 / np.hypot(256, 256))
    assert not found["sfm_camera_acceleration"].valid


def test_a_flat_zoom_is_not_taken_for_a_turning_camera(correct):
    assert measure(ken_burns(correct))["sfm_registered"].valid


def test_it_repeats_exactly(correct):
    assert measure(correct) == measure(correct.copy())
