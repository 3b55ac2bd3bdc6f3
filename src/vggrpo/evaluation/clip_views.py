"""Which frames of a video a geometry network sees, and at which size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.io.video import stream_video

MOST_KEPT = 256  # frames in memory; of a longer video every 2nd, 4th, ... is kept


@dataclass(frozen=True)
class Clip4D:
    """Frames of one video, evenly spaced and scaled."""

    frames: UInt8[np.ndarray, "T H W 3"]
    index: list[int]
    """Place of each in the video."""
    seconds: list[float]
    """Time of each in the video."""
    source_size: tuple[int, int]
    """(height, width) of the video itself."""
    source_frames: int
    """Length of the video itself."""
    rate: float
    """Frames per second of the video itself."""

    def take(self, chosen: list[int]) -> Clip4D:
        """Some of the frames."""
        return Clip4D(
            self.frames[chosen], [self.index[i] for i in chosen], [self.seconds[i] for i in chosen],
            self.source_size, self.source_frames, self.rate,
        )  # fmt: skip

    @property
    def tensor(self) -> Float[Tensor, "1 T 3 H W"]:
        """The frames in [0, 1], as networks take them."""
        return torch.from_numpy(self.frames).permute(0, 3, 1, 2)[None].float() / 255


def load_clip(path: Path | str, long_side: int) -> Clip4D:
    """Read a video of any size, length and rate; at most `MOST_KEPT` frames of at most `long_side` pixels are held.

    Raises:
        UserError: when it cannot be read, or has fewer than two frames.
    """
    kept: list[tuple[int, float, np.ndarray]] = []
    step, total, size, rate = 1, 0, (0, 0), 0.0
    for frame in stream_video(path):
        size, rate = (frame.image.shape[0], frame.image.shape[1]), frame.rate
        if total % step == 0:
            kept.append((total, frame.seconds, _scaled(frame.image, fit(size, long_side))))
        if len(kept) > MOST_KEPT:
            kept, step = kept[::2], 2 * step
        total += 1
    if total < 2:
        raise UserError(f"video {path} has one frame; the geometry of a scene needs at least two")
    index, seconds, images = zip(*kept, strict=True)
    return Clip4D(np.stack(images), list(index), list(seconds), size, total, rate)


def fit(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    """(height, width) scaled down, never up, so that the longer side is at most `long_side`."""
    scale = min(1.0, long_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resized(clip: Clip4D, size: tuple[int, int]) -> Clip4D:
    """The clip at exactly (height, width); a few pixels of stretch rather than a crop, so that nothing is lost."""
    frames = np.stack([_scaled(frame, size) for frame in clip.frames])
    return Clip4D(frames, clip.index, clip.seconds, clip.source_size, clip.source_frames, clip.rate)


def evenly(count: int, views: int, step: int) -> list[int]:
    """0, k, 2k, ... < count with the smallest k >= `step` that gives at most `views` of them, and at least two."""
    k = min(max(step, math.ceil((count - 1) / (views - 1))), count - 1)
    return list(range(0, count, k))


def for_latents(count: int, views: int, temporal_stride: int) -> list[int]:
    """Frames that a video VAE takes (`temporal_stride` n + 1 of them, evenly spaced) for at most `views` latent frames.

    Raises:
        UserError: when the video is too short for two latent frames.
    """
    if count < temporal_stride + 1:
        raise UserError(
            f"the video has {count} frames; an LGM needs at least {temporal_stride + 1}: use a geometry model (--model)"
        )
    groups = min(views - 1, (count - 1) // temporal_stride)
    k = (count - 1) // (groups * temporal_stride)
    return [i * k for i in range(groups * temporal_stride + 1)]


def _scaled(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    if image.shape[:2] == size:
        return image
    smaller = size[0] < image.shape[0]
    return np.asarray(cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR))
