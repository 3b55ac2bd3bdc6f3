"""The registry of per-video metrics: name, unit, direction, independence, cost, role.

`METRICS` is the one place that says what a number means and whether training has seen it; whoever writes a result
can't relabel it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vggrpo.errors import UserError
from vggrpo.evaluation.metrics.adherence import adherence
from vggrpo.evaluation.metrics.base import Clip, Measurement, Metric
from vggrpo.evaluation.metrics.camera import camera
from vggrpo.evaluation.metrics.epipolar import epipolar, epipolar_xfeat
from vggrpo.evaluation.metrics.flow_cycle import flow_cycle
from vggrpo.evaluation.metrics.motion import motion_flow, sharpness, ssim_change
from vggrpo.evaluation.metrics.reprojection import judge_reprojection, teacher_reprojection
from vggrpo.evaluation.metrics.sfm import sfm
from vggrpo.evaluation.metrics.truth import truth
from vggrpo.evaluation.metrics.vbench import DIMENSIONS, vbench

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels

__all__ = ["HEADLINE", "METRICS", "Clip", "Measurement", "Metric", "compute", "insisted", "select"]

# Fixed before any result was seen; all other metrics are listed beside them with Holm correction.
HEADLINE = ("epipolar_inliers", "judge_reprojection")

_EPIPOLAR = (
    Metric("epipolar_inliers", "share", True, "independent", "fast", "score", epipolar,
           "Share of matched points that obey one rigid camera motion."),
    Metric("epipolar_error", "diagonals", False, "independent", "fast", "score", epipolar,
           "Median distance of matched points to the epipolar geometry."),
    Metric("epipolar_matches", "matches", True, "independent", "fast", "guard", epipolar,
           "Matched points a frame pair."),
    Metric("epipolar_displacement", "diagonals", True, "independent", "fast", "guard", epipolar,
           "Median displacement of matched points."),
    Metric("epipolar_homography_gap", "share", True, "independent", "fast", "guard", epipolar,
           "Inliers that only a scene with depth explains: a flat picture has none."),
    Metric("epipolar_failed_pairs", "share", False, "independent", "fast", "guard", epipolar,
           "Frame pairs without enough matches; they count as the worst score."),
)  # fmt: skip

_ALL = (
    *_EPIPOLAR[:2],
    Metric("judge_reprojection", "median depths", False, "reward-related", "fast", "score", judge_reprojection,
           "Depth disagreement between views, by a geometry network that training never saw.", needs=("judge",)),
    Metric("flow_cycle", "ratio", False, "independent", "fast", "score", flow_cycle,
           "How far optical flow there and back misses home, relative to the flow."),
    Metric("camera_acceleration", "ratio", False, "reward-related", "fast", "score", camera,
           "Jerkiness of the camera path that the judge sees: 0 steady, 1 back and forth.", needs=("judge",)),
    Metric("adherence", "share", True, "independent", "fast", "score", adherence,
           "Share of what the prompt asks for that a classifier recognises.", needs=("attributes",)),
    Metric("motion_flow", "diagonals/s", True, "independent", "fast", "guard", motion_flow,
           "Median optical flow: a still video is consistent too."),
    Metric("ssim_change", "1 - SSIM", True, "independent", "fast", "guard", ssim_change,
           "How much the picture changes from the first frame."),
    Metric("sharpness", "luma^2", True, "independent", "fast", "guard", sharpness,
           "Variance of the Laplacian: a blurred video is consistent too."),
    Metric("camera_travel", "median depths + rad", True, "reward-related", "fast", "guard", camera,
           "Path length and rotation of the camera.", needs=("judge",)),
    Metric("camera_largest_step", "ratio", False, "reward-related", "fast", "guard", camera,
           "Largest camera step over the median step: a teleport hides in a mean.", needs=("judge",)),
    *_EPIPOLAR[2:],
    Metric("sfm_registered", "share", True, "independent", "slow", "score", sfm,
           "Share of frames that structure from motion can put into one rigid scene.", needs=("sfm",)),
    Metric("sfm_track_length", "frames", True, "independent", "slow", "score", sfm,
           "Frames that see a reconstructed point.", needs=("sfm",)),
    Metric("sfm_reprojection", "diagonals", False, "independent", "slow", "score", sfm,
           "Reprojection error of reconstructed points; frames that fail count with the worst.", needs=("sfm",)),
    Metric("sfm_camera_acceleration", "ratio", False, "reward-related", "slow", "score", sfm,
           "Jerkiness of the camera path that structure from motion finds.", needs=("sfm",)),
    Metric("sfm_camera_largest_step", "ratio", False, "reward-related", "slow", "guard", sfm,
           "Largest step of that path over its median step.", needs=("sfm",)),
    *(Metric(metric.name.replace("epipolar", "epipolar_xfeat"), metric.unit, metric.higher_is_better, "independent",
             "slow", metric.role, epipolar_xfeat, metric.about[:-1] + ", matched by XFeat and LighterGlue.",
             needs=("xfeat",))
      for metric in _EPIPOLAR),
    Metric("teacher_reprojection", "median depths", False, "reward", "slow", "score", teacher_reprojection,
           "Depth disagreement by the network that the LGM was made from: no evidence, for comparison.",
           needs=("teacher",)),
    Metric("truth_depth", "AbsRel", False, "independent", "slow", "score", truth,
           "The judge's depth against the renderer's; rendered clips only.", needs=("judge",)),
    Metric("truth_rotation", "degrees", False, "independent", "slow", "score", truth,
           "The judge's rotations against the renderer's.", needs=("judge",)),
    Metric("truth_translation", "share of the path", False, "independent", "slow", "score", truth,
           "The judge's camera centres against the renderer's.", needs=("judge",)),
    Metric("truth_mask", "IoU", True, "independent", "slow", "score", truth,
           "The judge's moving pixels against the renderer's.", needs=("judge",)),
    *(Metric(f"vbench_{name}", "VBench", True, "independent", "slow", "score", vbench,
             f"VBench's {name.replace('_', ' ')}; still videos do well.", needs=("vbench",)) for name in DIMENSIONS),
)  # fmt: skip

GROUPS = ("fast", "all")
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def select(metrics: str | Iterable[str]) -> list[Metric]:
    """Registered metrics from `fast`, `all`, a comma-separated string, or names.

    Raises:
        UserError: when a name is unknown (the known ones are listed).
    """
    chosen: dict[str, Metric] = {}
    for name in _names(metrics):
        if name in GROUPS:
            chosen |= {metric.name: metric for metric in _ALL if name == "all" or metric.cost == "fast"}
        elif name in METRICS:
            chosen[name] = METRICS[name]
        else:
            raise UserError(f"unknown metric {name!r}; known are {', '.join(GROUPS)}, {', '.join(METRICS)}")
    if not chosen:
        raise UserError(f"no metric chosen; known are {', '.join(GROUPS)}, {', '.join(METRICS)}")
    return list(chosen.values())


def insisted(metrics: str | Iterable[str]) -> list[Metric]:
    """Those that a run can't do without: all but what only `all` asks for, whose needs may be absent."""
    return select("fast" if name == "all" else name for name in _names(metrics))


def _names(metrics: str | Iterable[str]) -> list[str]:
    return [name.strip() for name in metrics.split(",")] if isinstance(metrics, str) else list(metrics)


def compute(clip: Clip, metrics: Sequence[Metric], models: EvaluationModels) -> dict[str, Measurement]:
    """Measurements of one clip; functions that yield several metrics run once.

    A metric that raises is that metric's invalid measurement with the error as reason: a long evaluation must end
    with a row for every video.
    """
    missing = models.missing({need for metric in metrics for need in metric.needs})
    done: dict[str, Measurement] = {}
    for metric in metrics:
        if metric.name in done:
            continue
        absent = [missing[need] for need in metric.needs if need in missing]
        try:
            done |= {metric.name: Measurement.invalid(absent[0])} if absent else metric.compute(clip, models)
        except Exception as error:  # any failure of one metric on one video is a counted, named failure
            text = " ".join(str(error).split())[:300]
            failed = Measurement.invalid(text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")
            done |= {other.name: failed for other in METRICS.values() if other.compute is metric.compute}
    return {metric.name: done[metric.name] for metric in metrics}
