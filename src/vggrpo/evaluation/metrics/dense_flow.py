"""Dense optical flow by DIS (Kroeger et al. 2016, as in OpenCV), on frames large enough for its 8 x 8 patches."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from vggrpo.evaluation.metrics.base import Clip, frame_pairs

GAP = 0.125  # seconds: one frame at 8 fps, two at 16
STEP = 0.125
MOST_PAIRS = 40
SHORTEST, LONGEST = 192, 360  # short side of the working frame, px


def flow_pairs(clip: Clip) -> list[tuple[int, int]]:
    """Frame pairs that the flow metrics look at; their real gap is (j - i) / fps seconds."""
    return frame_pairs(clip.num_frames, clip.fps, GAP, STEP, MOST_PAIRS)


def dense_flow(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Flow (H, W, 2) in pixels from grey frame `first` to `second`, both (H, W)."""
    return np.asarray(
        cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST).calc(first, second, None), dtype=np.float32
    )


def working_frame(clip: Clip, index: int) -> NDArray[np.uint8]:
    """Frame `index` as the flow sees it."""
    return clip.grey_at(index, SHORTEST, LONGEST)


def cycle_error(forward: NDArray[np.float32], backward: NDArray[np.float32]) -> NDArray[np.float32]:
    """|f(x) + b(x + f(x))| in pixels where x + f(x) stays inside the frame: (N,). Both flows are (H, W, 2)."""
    height, width = forward.shape[:2]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    to_x, to_y = columns + forward[..., 0], rows + forward[..., 1]
    back = cv2.remap(backward, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
    return np.asarray(np.linalg.norm(forward + back, axis=-1)[inside], dtype=np.float32)
