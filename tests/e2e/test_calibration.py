"""Calibration on clips with known truth, rendered ones and real footage: the ranking that each metric gives."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from vggrpo.evaluation import Clip, evaluate_clip

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from calibration_clips import FLAT, PARALLAX, REAL, SECONDS, Frames, another, footage, ken_burns, rendered, spoilt

pytestmark = pytest.mark.e2e

NAMES = [
    "epipolar_inliers", "epipolar_error", "epipolar_matches", "epipolar_displacement", "epipolar_homography_gap",
    "flow_cycle", "motion_flow", "ssim_change", "sharpness",
]  # fmt: skip
Table = dict[str, dict[str, list[float | None]]]


def measure(clips: list[tuple[Frames, float]], names: list[str]) -> Table:
    """Values by metric and by how the clip was spoilt, one a clip."""
    table: Table = {}
    for index, (frames, fps) in enumerate(clips):
        other = another([clip for clip, _ in clips], index)
        for kind, clip in spoilt(frames, other, fps).items():
            for name, found in evaluate_clip(Clip(clip, fps), names).items():
                table.setdefault(name, {}).setdefault(kind, []).append(found.value)
    return table


def mean(values: list[float | None]) -> float:
    assert all(value is not None for value in values), values
    return float(np.mean([value for value in values if value is not None]))


def check_rankings(table: Table) -> None:
    """What has to hold whatever the footage."""
    score = {name: {kind: mean(v) for kind, v in by.items() if None not in v} for name, by in table.items()}
    inliers, error, cycle = (score[name] for name in ("epipolar_inliers", "epipolar_error", "flow_cycle"))
    assert inliers["correct"] > inliers["wobble 1 px"] + 0.05 > inliers["wobble 4 px"] + 0.1, inliers
    assert error["correct"] < error["wobble 1 px"] < error["wobble 4 px"], error
    assert cycle["correct"] < cycle["wobble 1 px"] < cycle["wobble 4 px"], cycle
    assert inliers["correct"] > inliers["hard cut"] + 0.1 and error["correct"] < error["hard cut"]
    assert cycle["correct"] < cycle["hard cut"]
    # A shaking hand bends nothing: far closer to the steady clip than the smallest wobble is.
    assert inliers["hand-held"] > (inliers["correct"] + inliers["wobble 1 px"]) / 2, inliers
    # A still clip has no geometry to be right about, and the guards say that it is still.
    for kind in ("still + noise", "frozen"):
        assert set(table["epipolar_inliers"][kind]) == set(table["flow_cycle"][kind]) == {None}, kind
        for name in ("motion_flow", "ssim_change", "epipolar_displacement"):
            assert score[name][kind] < 0.5 * score[name]["correct"], (name, kind, score[name])
    # Blur and flat zooms may match the score; a guard exposes each.
    assert score["sharpness"]["blurred"] < 0.5 * score["sharpness"]["correct"]
    assert score["epipolar_matches"]["blurred"] < score["epipolar_matches"]["correct"]
    gap = score["epipolar_homography_gap"]
    assert gap["Ken Burns"] < 0.6 * gap["correct"], gap


def test_rankings_on_rendered_clips():
    clips = [(clip, 8.0) for clip in [*rendered([1, 2], "truck_right"), *rendered([3], "orbit_left")]]
    check_rankings(measure(clips, NAMES))


def test_rankings_on_real_footage(shared_dir):
    """Three cameras that move: a slow zoom over a flat scene, a fast pan after a dog, a dolly through a room."""
    videos = shared_dir / "data" / "videos"
    absent = [name for name, _ in REAL if not (videos / name).is_file()]
    if absent:
        pytest.skip(f"real footage is absent: {', '.join(absent)}")
    check_rankings(measure([footage(videos / name, start, SECONDS) for name, start in REAL], NAMES))


def check_sfm(table: Table) -> None:
    """What has to hold of structure from motion where the camera sees parallax."""
    score = {name: {kind: mean(v) for kind, v in by.items() if None not in v} for name, by in table.items()}
    registered, tracks, error = (score[f"sfm_{name}"] for name in ("registered", "track_length", "reprojection"))
    # Points that stay always fit: the error tells bent from rigid, the track length how strongly it is bent.
    assert error["correct"] < 0.8 * min(error["wobble 1 px"], error["wobble 4 px"]), error
    assert tracks["correct"] > tracks["wobble 1 px"] > tracks["wobble 4 px"], tracks
    assert error["correct"] < error["hard cut"] and registered["correct"] > registered["hard cut"] + 0.2
    # A shaking hand costs a few matches and no consistency.
    assert registered["hand-held"] > 0.9 * registered["correct"], registered
    assert error["hand-held"] < (error["correct"] + error["wobble 1 px"]) / 2, error
    for kind in ("still + noise", "frozen"):
        assert set(table["sfm_registered"][kind]) == {None}, kind


SFM = ["sfm_registered", "sfm_track_length", "sfm_reprojection"]


def test_structure_from_motion_ranks_rendered_clips():
    pytest.importorskip("pycolmap", reason="pycolmap (extra sfm) is not installed")
    clips = [(clip, 8.0) for clip in [*rendered([1, 2], "truck_right"), *rendered([3], "orbit_left")]]
    check_sfm(measure(clips, SFM))


def test_structure_from_motion_ranks_real_footage(shared_dir):
    """Three stretches with parallax: of a dog and of two places in a room."""
    pytest.importorskip("pycolmap", reason="pycolmap (extra sfm) is not installed")
    videos = shared_dir / "data" / "videos"
    absent = [name for name, _ in PARALLAX if not (videos / name).is_file()]
    if absent:
        pytest.skip(f"real footage is absent: {', '.join(absent)}")
    check_sfm(measure([footage(videos / name, start, SECONDS) for name, start in PARALLAX], SFM))


def test_structure_from_motion_finds_nothing_in_a_flat_zoom(shared_dir):
    """A real zoom over a flat scene is a Ken Burns of it: the worst score, not a missing one."""
    pytest.importorskip("pycolmap", reason="pycolmap (extra sfm) is not installed")
    name, start = FLAT
    video = shared_dir / "data" / "videos" / name
    if not video.is_file():
        pytest.skip(f"real footage is absent: {name}")
    frames, fps = footage(video, start, SECONDS)
    for clip in (frames, ken_burns(frames)):
        found = evaluate_clip(Clip(clip, fps), SFM)
        assert found["sfm_registered"].value == 0 and found["sfm_track_length"].value == 0, found
        assert found["sfm_reprojection"].valid, found["sfm_reprojection"].reason
