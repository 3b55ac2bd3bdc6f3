"""Camera motion from poses of the judge (an independent geometry network that sees RGB).

- `camera_acceleration`: (e_trans + e_rot) / 2 of the motion reward, that is mean |a_i| / (|v_i| + |v_{i+1}| + eps) of
  translation and rotation: 0 is a steady move, 1 a jump back and forth. The poses are independent of training, the
  formula is not: `reward-related`.
- `camera_travel`: path length / median depth + total rotation in radians (guard: a camera that stands still is
  perfectly smooth).
- `camera_largest_step`: largest step between views / median step (guard: one teleport hides in a mean).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vggrpo.evaluation.metrics.base import Clip, Measurement
from vggrpo.rewards import camera_motion_smoothness, camera_travel

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels

NAMES = ("camera_acceleration", "camera_travel", "camera_largest_step")
STEP_FLOOR = 1e-3  # median depths; below it the median step is no scale to measure with


def camera(clip: Clip, models: EvaluationModels) -> dict[str, Measurement]:
    """Smoothness, travel and largest step of the judge's camera path."""
    prediction = models.judge_prediction(clip)
    views = prediction.cam2world.shape[1]
    if views < 3:
        return {
            name: Measurement.invalid(f"the clip has {views} views; acceleration needs three (nine frames)")
            for name in NAMES
        }
    smoothness = camera_motion_smoothness(prediction)
    if not bool(smoothness.valid[0]):
        return {name: Measurement.invalid("the judge's poses are not finite") for name in NAMES}
    centres = prediction.cam2world[0, :, :3, 3]
    steps = (centres[1:] - centres[:-1]).norm(dim=-1) / prediction.depth[0].median()  # (S - 1,)
    typical = float(torch.median(steps).clamp_min(STEP_FLOOR))
    trans, rot = (float(smoothness.terms[name][0]) for name in ("e_trans", "e_rot"))
    return {
        "camera_acceleration": Measurement.of((trans + rot) / 2, terms=[trans, rot]),
        "camera_travel": Measurement.of(float(camera_travel(prediction)[0])),
        "camera_largest_step": Measurement.of(float(steps.max()) / typical, steps=steps.tolist()),
    }
