"""Flow cycle: does the flow there and back again come home?

    flow_cycle = mean over pairs of  median_x |f(x) + b(x + f(x))| / median_x |f(x)|

A popping or melting surface has no consistent correspondence, so its flow doesn't invert. The ratio is undefined
where nothing moves: pairs whose median flow is under the motion floor are left out, and a clip without a moving pair
is invalid rather than perfect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vggrpo.evaluation.metrics.base import Clip, Measurement
from vggrpo.evaluation.metrics.dense_flow import cycle_error, dense_flow, flow_pairs, working_frame

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels

MOTION_FLOOR = 0.25  # px of the working frame between the two frames of a pair


def flow_cycle(clip: Clip, models: EvaluationModels | None = None) -> dict[str, Measurement]:
    """Forward-backward error over median flow; lower is better."""
    pairs = flow_pairs(clip)
    if not pairs:
        return {"flow_cycle": Measurement.invalid("the clip has fewer than two frames 0.125 s apart")}
    ratios = []
    for i, j in pairs:
        first, second = working_frame(clip, i), working_frame(clip, j)
        forward = dense_flow(first, second)
        size = float(np.median(np.linalg.norm(forward, axis=-1)))
        if size < MOTION_FLOOR:
            continue
        error = cycle_error(forward, dense_flow(second, first))
        if error.size:
            ratios.append(float(np.median(error)) / size)
    if not ratios:
        return {
            "flow_cycle": Measurement.invalid(
                f"median flow stays under {MOTION_FLOOR} px a pair; a still clip has no cycle to close"
            )
        }
    return {"flow_cycle": Measurement.of(float(np.mean(ratios)), pairs=ratios)}
