"""Motion and sharpness: the guards that every consistency number is read with, because still and blurred videos are
consistent too.

- `motion_flow`: median flow magnitude over pixels, in image diagonals per second, mean over pairs (independent of
  size and frame rate).
- `ssim_change`: 1 - SSIM (Wang et al. 2004, Gaussian window 11, sigma 1.5) of the first frame to frames every half
  second, mean.
- `sharpness`: variance of the Laplacian of luma in [0, 1] at the clip's own size, median over frames. Noise raises it
  too, so compare it between arms and not with other videos.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from vggrpo.evaluation.metrics.base import Clip, Measurement
from vggrpo.evaluation.metrics.dense_flow import dense_flow, flow_pairs, working_frame

if TYPE_CHECKING:
    from vggrpo.evaluation.models import EvaluationModels

SAMPLE_STEP = 0.5  # seconds
MOST_SAMPLES = 16


def motion_flow(clip: Clip, models: EvaluationModels | None = None) -> dict[str, Measurement]:
    """Median flow in diagonals per second."""
    speeds = []
    for i, j in flow_pairs(clip):
        flow = dense_flow(working_frame(clip, i), working_frame(clip, j))
        diagonal = float(np.hypot(*flow.shape[:2]))
        speeds.append(float(np.median(np.linalg.norm(flow, axis=-1))) / diagonal * clip.fps / (j - i))
    if not speeds:
        return {"motion_flow": Measurement.invalid("the clip has fewer than two frames 0.125 s apart")}
    return {"motion_flow": Measurement.of(float(np.mean(speeds)), pairs=speeds)}


def structural_similarity(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Mean SSIM of two grey frames (H, W), in [-1, 1]."""

    def blur(image: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(cv2.GaussianBlur(image, (11, 11), 1.5))

    a, b = first.astype(np.float64) / 255, second.astype(np.float64) / 255
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    return float(
        np.mean((2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    )


def ssim_change(clip: Clip, models: EvaluationModels | None = None) -> dict[str, Measurement]:
    """1 - SSIM to the first frame."""
    stride = max(1, round(SAMPLE_STEP * clip.fps))
    indices = list(range(stride, clip.num_frames, stride))[:MOST_SAMPLES]
    if not indices:
        return {
            "ssim_change": Measurement.invalid(f"the clip lasts {clip.seconds:.2f} s, shorter than {SAMPLE_STEP} s")
        }
    changes = [1.0 - structural_similarity(clip.grey[0], clip.grey[index]) for index in indices]
    return {"ssim_change": Measurement.of(float(np.mean(changes)), frames=changes)}


def sharpness(clip: Clip, models: EvaluationModels | None = None) -> dict[str, Measurement]:
    """Variance of the Laplacian, median over frames."""
    if clip.num_frames == 0:
        return {"sharpness": Measurement.invalid("the clip has no frames")}
    values = [float(cv2.Laplacian(frame.astype(np.float64) / 255, cv2.CV_64F).var()) for frame in clip.grey]
    return {"sharpness": Measurement.of(float(np.median(values)), frames=values)}
