"""Structure from motion: which clips are listed apart, and why."""

from __future__ import annotations

import numpy as np
import pytest
from calibration_clips import Frames, rendered, still_with_noise

from vggrpo.evaluation import Clip, Measurement
from vggrpo.evaluation.metrics.sfm import sfm

pytest.importorskip("pycolmap", reason="pycolmap (extra sfm) is not installed")


def measure(frames: Frames) -> dict[str, Measurement]:
    return sfm(Clip(frames, 8))


@pytest.fixture(scope="module")
def correct() -> Frames:
    return rendered([2], "truck_right")[0]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda clip: still_with_noise(clip), "still"),
        (lambda clip: np.full_like(clip, 127), "no texture"),
        (lambda clip: rendered([2], "pan_left")[0], "pure rotation"),
        (lambda clip: clip[:3], "three frames"),
    ],
)
def test_clips_that_say_nothing_are_listed_apart(correct, make, reason):
    for measurement in measure(make(correct)).values():
        assert measurement.value is None and reason in str(measurement.reason)
