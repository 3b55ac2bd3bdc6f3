"""Flow cycle: does the flow there and back again come home?

    flow_cycle = mean over half seconds of  mean over pairs of median_x |f(x) + b(x + f(x))|  /  net motion

A popping or melting surface has no consistent correspondence, so its flow doesn't invert. The pairs of half a second
follow each other, and its net motion is how far a point gets that is carried along by their flows, median over pixels,
for each pair: a surface that bends to and fro moves, but gets nowhere. (Divided by the flow itself, as usual, a strong
wobble scores better than a weak one, since it adds as much flow as error.)

The ratio is undefined where nothing gets anywhere: half seconds whose net motion is under the motion floor are left
out, and a clip without one that moves is invalid rather than perfect. What it can't see: a smooth bend has an inverse,
so that only what bending costs in precision is measured. `epipolar` is the metric for it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from vggrpo.evaluation.metrics.base import Clip, Measurement
from vggrpo.evaluation.metrics.dense_flow import GAP, MOST_PAIRS, cycle_error, dense_flow, working_frame

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels

WINDOW = 0.5  # seconds over which net motion is taken
MOTION_FLOOR = 0.25  # px of the working frame a pair


def flow_cycle(clip: Clip, models: EvaluationModels | None = None) -> dict[str, Measurement]:
    """Forward-backward error over net motion; lower is better."""
    chains = _chains(clip.num_frames, clip.fps)
    if not chains:
        return {"flow_cycle": Measurement.invalid(f"the clip has fewer than two frames {GAP} s apart")}
    ratios = [ratio for ratio in (_ratio(clip, chain) for chain in chains) if ratio is not None]
    if not ratios:
        return {
            "flow_cycle": Measurement.invalid(
                f"no half second gets further than {MOTION_FLOOR} px a pair; a still clip has no cycle to close"
            )
        }
    return {"flow_cycle": Measurement.of(float(np.mean(ratios)), windows=ratios)}


def _chains(num_frames: int, fps: float) -> list[list[int]]:
    """Frames `GAP` apart over `WINDOW`, one list a window, evenly spread; of a shorter clip as many as there are."""
    span = max(1, round(GAP * fps))
    length = min(max(1, round(WINDOW * fps / span)), (num_frames - 1) // span)
    if length < 1:
        return []
    starts = np.arange(0, num_frames - span * length, span * length)
    most = MOST_PAIRS // length
    if len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).round().astype(int)]
    return [[int(start) + span * k for k in range(length + 1)] for start in starts]


def _ratio(clip: Clip, chain: list[int]) -> float | None:
    """Error over net motion of one window; None where the picture gets nowhere, or leaves the frame."""
    frames = [working_frame(clip, index) for index in chain]
    height, width = frames[0].shape
    start = np.stack(np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)), -1)
    place, errors = start.copy(), []
    for first, second in pairwise(frames):
        forward = dense_flow(first, second)
        error = cycle_error(forward, dense_flow(second, first))
        if not error.size:
            return None
        errors.append(float(np.median(error)))
        place += _at(forward, place)
    inside = ((place >= 0) & (place <= np.array([width - 1, height - 1], dtype=np.float32))).all(-1)
    if not inside.any():
        return None
    net = float(np.median(np.linalg.norm(place - start, axis=-1)[inside])) / len(errors)
    return None if net < MOTION_FLOOR else float(np.mean(errors)) / net


def _at(flow: NDArray[np.float32], place: NDArray[np.float32]) -> NDArray[np.float32]:
    """The flow (H, W, 2) at positions (H, W, 2), and at the border for those outside."""
    return np.asarray(cv2.remap(flow, place[..., 0], place[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
