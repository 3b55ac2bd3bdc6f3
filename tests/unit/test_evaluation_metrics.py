"""Each metric: known answers and validity; those of a judge rank clips with known truth."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from calibration_clips import Frames, rendered

from vggrpo.errors import UserError
from vggrpo.evaluation import METRICS, Clip, EvaluationModels, Measurement, evaluate_clip
from vggrpo.evaluation.metrics import compute, select
from vggrpo.evaluation.metrics.base import frame_pairs
from vggrpo.evaluation.metrics.epipolar import WORST_ERROR
from vggrpo.evaluation.metrics.motion import structural_similarity
from vggrpo.evaluation.metrics.pose import relative_pose
from vggrpo.evaluation.metrics.two_view import fit_fundamental, sampson_distance
from vggrpo.geometry import GeometryPrediction

CLASSICAL = [name for name, metric in METRICS.items() if not metric.needs]


@pytest.fixture(scope="module")
def correct() -> list[Frames]:
    return [*rendered([1, 2], "truck_right"), *rendered([3], "orbit_left")]


def mean(clips: list[Frames], name: str, fps: float = 8.0) -> float:
    """Mean of a metric over clips that must all be valid."""
    values = [evaluate_clip(Clip(clip, fps), [name])[name] for clip in clips]
    assert all(value.valid for value in values), [value.reason for value in values]
    return float(np.mean([value.value for value in values]))


def test_sampson_distance_is_the_displacement_off_the_epipolar_line() -> None:
    sideways = np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=float)  # pure translation along x: lines are rows
    first = np.array([[10.0, 20.0], [30.0, 40.0]])
    second = np.array([[15.0, 20.0], [31.0, 42.0]])
    # A mismatch of 2 px is shared by both frames: 2 / sqrt(2).
    assert sampson_distance(sideways, first, second) == pytest.approx([0, np.sqrt(2)])


def test_fundamental_matrix_survives_outliers_and_repeats_exactly() -> None:
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(-2, 2, (200, 2)), rng.uniform(3, 8, 200)])
    turn = np.array([[np.cos(0.1), 0, np.sin(0.1)], [0, 1, 0], [-np.sin(0.1), 0, np.cos(0.1)]])
    first, second = (p[:, :2] / p[:, 2:] * 200 + 128 for p in (points, points @ turn.T + [0.5, 0.1, 0]))
    second[:60] += rng.uniform(-40, 40, (60, 2))
    found = fit_fundamental(first, second, seed=3)
    assert found is not None
    assert np.median(sampson_distance(found, first, second)[60:]) < 0.1  # px
    np.testing.assert_array_equal(found, fit_fundamental(first, second, seed=3))


def test_known_intrinsics_give_the_pose_of_noisy_matches_with_outliers() -> None:
    rng = np.random.default_rng(1)
    points = np.column_stack([rng.uniform(-2, 2, (120, 2)), rng.uniform(3, 8, 120)])
    angle, move = 0.05, np.array([0.3, -0.1, 0.05])
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    intrinsics = np.array([[200.0, 0, 127.5], [0, 200.0, 127.5], [0, 0, 1]])
    first, second = ((p / p[:, 2:] @ intrinsics.T)[:, :2] for p in (points, points @ turn.T + move))
    second += rng.normal(0, 0.05, second.shape)
    second[:30] += rng.uniform(-30, 30, (30, 2))
    found = relative_pose(first, second, intrinsics)
    assert found is not None
    rotation, translation = found
    assert np.degrees(np.arccos((np.trace(rotation @ turn.T) - 1) / 2)) < 0.2
    assert translation @ move / np.linalg.norm(move) > 0.995
    assert relative_pose(first[:5], second[:5], intrinsics) is None


def test_frame_pairs_are_gaps_in_time() -> None:
    assert frame_pairs(17, 8, 0.5, 0.5, 99) == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert frame_pairs(33, 16, 0.5, 0.5, 99) == [(0, 8), (8, 16), (16, 24), (24, 32)]
    assert len(frame_pairs(1000, 8, 0.5, 0.5, 16)) == 16
    assert frame_pairs(3, 8, 0.5, 0.5, 99) == []


def test_similarity_of_a_picture_with_itself_is_one(correct: list[Frames]) -> None:
    grey = Clip(correct[0], 8).grey
    assert structural_similarity(grey[0], grey[0]) == pytest.approx(1)
    assert structural_similarity(grey[0], 255 - grey[0]) < 0.2


def test_motion_is_in_diagonals_per_second() -> None:
    rng = np.random.default_rng(0)
    import cv2

    wide = cv2.GaussianBlur(rng.uniform(0, 255, (64, 200)), (0, 0), 2.0)
    wide = ((wide - wide.min()) / np.ptp(wide) * 255).astype(np.uint8)
    clip = np.stack([np.repeat(wide[:, 2 * t : 2 * t + 64, None], 3, -1) for t in range(17)])  # 2 px a frame
    for fps in (8.0, 16.0):
        speed = mean([clip], "motion_flow", fps)
        assert speed == pytest.approx(2 * fps / np.hypot(64, 64), rel=0.1)


@pytest.mark.parametrize(
    ("frames", "fps"), [(1, 8), (2, 8), (5, 16), (17, 240)], ids=["one frame", "two", "short", "240 fps"]
)
def test_short_clips_are_invalid_with_a_reason_or_a_number(correct: list[Frames], frames: int, fps: float) -> None:
    for name, found in evaluate_clip(Clip(correct[0][:frames], fps), CLASSICAL).items():
        assert found.valid == (found.value is not None)
        assert found.valid or found.reason, name


def test_a_blank_clip_is_the_worst_score_and_never_a_perfect_one() -> None:
    found = evaluate_clip(Clip(np.full((17, 64, 64, 3), 127, np.uint8), 8), CLASSICAL)
    assert found["epipolar_inliers"].value == 0
    assert found["epipolar_error"].value == WORST_ERROR
    assert found["epipolar_failed_pairs"].value == 1
    assert not found["flow_cycle"].valid


def test_other_sizes_and_shapes(correct: list[Frames]) -> None:
    wide = np.repeat(correct[0][:9], 2, axis=2)[:, :, :101]
    found = evaluate_clip(Clip(np.ascontiguousarray(wide), 8), CLASSICAL)
    assert found["epipolar_inliers"].valid and found["motion_flow"].valid


def test_metrics_repeat_exactly(correct: list[Frames]) -> None:
    clips = [Clip(correct[0], 8), Clip(correct[0].copy(), 8)]
    assert evaluate_clip(clips[0], CLASSICAL) == evaluate_clip(clips[1], CLASSICAL)


def test_bad_clips_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        Clip(np.zeros((2, 4, 4, 3)), 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fps"):
        Clip(np.zeros((2, 4, 4, 3), np.uint8), 0)
    with pytest.raises(UserError, match="unknown metric 'epipolr'"):
        select("fast,epipolr")
    assert [metric.name for metric in select("motion_flow, sharpness")] == ["motion_flow", "sharpness"]
    assert {metric.independence for metric in select("fast")} == {"independent", "reward-related"}


def test_a_metric_that_raises_is_an_invalid_measurement(correct: list[Frames]) -> None:
    class Broken:
        def __call__(self, frames: torch.Tensor) -> GeometryPrediction:
            raise RuntimeError("out of\nmemory")

    models = EvaluationModels(judge=Broken())
    found = compute(Clip(correct[0], 8), select("judge_reprojection,camera_travel,sharpness"), models)
    assert found["judge_reprojection"].reason == "RuntimeError: out of memory"
    assert not found["camera_travel"].valid
    assert found["sharpness"].valid
    assert Measurement.of(float("nan")).reason is not None


@functools.cache
def truth(shake: str) -> tuple[GeometryPrediction, Frames]:
    from vggrpo.world import sample_batch

    batch = sample_batch([11], camera="truck_right", shake=shake)
    return batch.geometry(), (batch.video[0].permute(1, 2, 3, 0) * 255).round().byte().numpy()


class Oracle:
    """A judge that answers with the renderer's truth; the depth of every view may be off by its own share `noise`."""

    def __init__(self, shake: str, noise: float = 0.0) -> None:
        self.truth, self.frames = truth(shake)
        self.noise = noise

    def __call__(self, frames: torch.Tensor) -> GeometryPrediction:
        real = self.truth
        assert frames.shape == (1, real.depth.shape[1], 3, *real.depth.shape[2:])
        wave = torch.randn(real.depth.shape[:2], generator=torch.Generator().manual_seed(0))[..., None, None]
        depth = real.depth * (1 + self.noise * wave)
        return GeometryPrediction.from_depth(real.cam2world, real.intrinsics, depth, dynamic_mask=real.dynamic_mask)

    def measure(self, name: str) -> float:
        found = evaluate_clip(Clip(self.frames, 8), [name], EvaluationModels(judge=self))[name]
        assert found.value is not None, found.reason
        return found.value


def test_camera_acceleration_ranks_hand_held_above_smooth() -> None:
    smooth, shaky = Oracle("smooth"), Oracle("handheld")
    assert shaky.measure("camera_acceleration") > smooth.measure("camera_acceleration") + 0.05
    assert smooth.measure("camera_travel") > 0.05
    assert smooth.measure("camera_largest_step") < 4


def test_judge_reprojection_ranks_depth_errors() -> None:
    errors = [Oracle("smooth", noise).measure("judge_reprojection") for noise in (0.0, 0.02, 0.1)]
    assert errors[0] < 0.005 and errors[0] < errors[1] < errors[2], errors


def test_adherence_needs_a_caption_it_can_read(correct: list[Frames]) -> None:
    from vggrpo.world import sample_prompts

    class Classifier:
        def adherence(self, video: torch.Tensor, attributes: list[dict]) -> torch.Tensor:
            assert video.shape == (1, 3, 17, 64, 64) and video.max() <= 1
            return torch.tensor([0.75])

        def features(self, video: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[1 / 3, 2.0]])

    models = EvaluationModels(attributes=Classifier())
    prompt = sample_prompts(1, 0)[0]
    found = evaluate_clip(Clip(correct[0], 8, prompt), ["adherence"], models)["adherence"]
    assert found.value == 0.75 and found.raw == {"features": [0.33333, 2.0], "shape": [17, 64, 64]}
    other = evaluate_clip(Clip(correct[0], 8, "a cat on a skateboard"), ["adherence"], models)["adherence"]
    assert not other.valid and "not a caption" in str(other.reason)
