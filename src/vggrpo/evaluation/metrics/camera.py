"""Camera motion, of poses whose source is part of the metric's name.

`camera_*`: the judge's poses (a geometry network that sees RGB). `sfm_camera_*`: structure from motion (`sfm.py`).

- `camera_acceleration`: (e_trans + e_rot) / 2 of the motion reward, that is mean |a_i| / (|v_i| + |v_{i+1}| + eps) of
  translation and rotation: 0 is a steady move, 1 a jump back and forth. The poses are independent of training, the
  formula is not: `reward-related`.
- `camera_travel`: path length / median depth + total rotation in radians (guard: a camera that stands still is
  perfectly smooth).
- `camera_largest_step`: largest step between views / median step (guard: one teleport hides in a mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from vggrpo.evaluation.metrics.base import Clip, Measurement
from vggrpo.geometry import GeometryPrediction
from vggrpo.rewards import camera_motion_smoothness

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels

NAMES = ("camera_acceleration", "camera_travel", "camera_largest_step")
STEP_FLOOR = 1e-3  # median depths; below it the median step is no scale to measure with


def camera(clip: Clip, models: EvaluationModels) -> dict[str, Measurement]:
    """Smoothness, travel and largest step of the judge's camera path."""
    return prediction_numbers(models.judge_prediction(clip))


def path_numbers(
    cam2world: Float[np.ndarray, "S 4 4"], median_depth: float, frame_index: Sequence[int]
) -> dict[str, Measurement]:
    """The same of any poses.

    Args:
        cam2world: poses with OpenCV axes, in any unit of length and any world frame.
        median_depth: of the scene, in that unit.
        frame_index: the frame each pose belongs to, increasing.
    """
    poses = torch.as_tensor(np.asarray(cam2world), dtype=torch.float64)[None]  # (1, S, 4, 4)
    depth = torch.full((*poses.shape[:2], 1, 1), median_depth, dtype=torch.float64)
    index = torch.as_tensor(list(frame_index))
    anchored = torch.linalg.inv(poses[:, :1]) @ poses
    intrinsics = torch.eye(3, dtype=torch.float64).expand(1, poses.shape[1], 3, 3)
    return prediction_numbers(GeometryPrediction.from_depth(anchored, intrinsics, depth, frame_index=index))


def prediction_numbers(prediction: GeometryPrediction) -> dict[str, Measurement]:
    """The metrics `NAMES` of one clip's geometry (B = 1)."""
    views = prediction.cam2world.shape[1]
    if views < 3:
        return {name: Measurement.invalid(f"the clip has {views} views; acceleration needs three") for name in NAMES}
    smoothness = camera_motion_smoothness(prediction)
    if not bool(smoothness.valid[0]):
        return {name: Measurement.invalid("the poses are not finite, or no pixel has a depth") for name in NAMES}
    centres = prediction.cam2world[0, :, :3, 3]
    steps = (centres[1:] - centres[:-1]).norm(dim=-1) / prediction.depth[0].median()  # (S - 1,)
    typical = float(torch.median(steps).clamp_min(STEP_FLOOR))
    trans, rot, travel = (float(smoothness.terms[name][0]) for name in ("e_trans", "e_rot", "travel"))
    return {
        "camera_acceleration": Measurement.of((trans + rot) / 2, terms=[trans, rot]),
        "camera_travel": Measurement.of(travel),
        "camera_largest_step": Measurement.of(float(steps.max()) / typical, steps=steps.tolist()),
    }
