"""Clips with known truth for the calibration of metrics: rendered footage and known ways to spoil it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
# Stretches of real footage where the camera moves: file, first second.
REAL = (("nasa_13013.mp4", 8.2), ("dog-example.mp4", 2.0), ("cosmos-example.mp4", 1.0))
FLAT = REAL[0]  # zooms over a flat scene
PARALLAX = (*REAL[1:], ("cosmos-example.mp4", 3.0))
SECONDS = 2.0


def rendered(seeds: list[int], camera: str = "truck_right", size: int = 64, shake: str = "smooth") -> list[Frames]:
    """Correct parallax: clips (17, size, size, 3) of the embedded world."""
    from vggrpo.world import sample_batch

    video = sample_batch(seeds, size=(size, size), shake=shake, camera=camera).video  # (B, 3, T, H, W)
    return [np.asarray((clip.permute(1, 2, 3, 0) * 255).round().byte().numpy()) for clip in video]


def still_with_noise(frames: Frames, sigma: float = 2.0, seed: int = 0) -> Frames:
    """The first frame again and again, with sensor noise of `sigma` grey levels."""
    noise = np.random.default_rng(seed).normal(0, sigma, frames.shape)
    return np.clip(frames[:1] + noise, 0, 255).round().astype(np.uint8)


def blurred(frames: Frames, sigma: float = 2.0) -> Frames:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in frames])


def ken_burns(frames: Frames, zoom: float = 1.35) -> Frames:
    """A zoom into the first frame: motion without parallax."""
    height, width = frames.shape[1:3]
    out = []
    for share in np.linspace(0, 1, len(frames)):
        scale = 1 + (zoom - 1) * share
        matrix = np.array([[scale, 0, (1 - scale) * width / 2], [0, scale, (1 - scale) * height / 2]])
        out.append(
            cv2.warpAffine(frames[0], matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        )
    return np.stack(out)


def wobble(frames: Frames, pixels: float, seed: int = 0) -> Frames:
    """Every frame is bent by its own smooth random field with a standard deviation of `pixels`: the surface melts."""
    rng = np.random.default_rng(seed)
    height, width = frames.shape[1:3]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    out = []
    for frame in frames:
        coarse = rng.normal(0, 1, (2, 5, 5)).astype(np.float32)
        field = np.stack([cv2.resize(part, (width, height), interpolation=cv2.INTER_CUBIC) for part in coarse])
        field *= pixels / field.std()
        out.append(
            cv2.remap(frame, columns + field[0], rows + field[1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        )
    return np.stack(out)


def hard_cut(first: Frames, second: Frames) -> Frames:
    """The first half of one scene, then the second half of another (brought to the first one's size)."""
    half, size = len(first) // 2, (first.shape[2], first.shape[1])
    rest = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in second[half : len(first)]]
    return np.concatenate([first[:half], np.stack(rest)])


def frozen(frames: Frames) -> Frames:
    """The first frame again and again, exactly."""
    return np.repeat(frames[:1], len(frames), axis=0)


def hand_held(frames: Frames, fps: float, pixels: float = 3.0, seed: int = 0) -> Frames:
    """A steady clip as a hand would have held it: every frame shifted and turned by band-limited noise.

    Turning a camera is a homography of the picture, so the world holds together as well as before. A margin is cropped
    and enlarged again; `pixels` is the standard deviation of the shift at a frame of 256 lines.
    """
    from vggrpo.world.camera import band_limited_noise

    height, width = frames.shape[1:3]
    noise = band_limited_noise(np.random.default_rng(seed), len(frames), fps, 3)
    scale, out = pixels * min(height, width) / 256, []
    for frame, (x, y, roll) in zip(frames, noise, strict=True):
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), 0.5 * roll, 1.15)
        matrix[:, 2] += scale * np.array([x, y])
        out.append(cv2.warpAffine(frame, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT))
    return np.stack(out)


def footage(file: Path, start: float, seconds: float, lines: int = 256) -> tuple[Frames, float]:
    """A stretch of a real video with a short side of `lines` pixels, and its frame rate."""
    from vggrpo.io.video import decode_video

    first = decode_video(file, 1).fps
    video = decode_video(file, max_frames=round((start + seconds) * first) + 1, most_lines=lambda *_: lines)
    return video.frames[round(start * video.fps) :], video.fps


def another(clips: list[Frames], index: int) -> Frames:
    """The clip after `index`, as long as that one, to cut to: it runs back and forth where it is too short."""
    other, length = clips[(index + 1) % len(clips)], len(clips[index])
    there_and_back = np.concatenate([other, other[::-1]])
    return np.concatenate([there_and_back] * (length // len(there_and_back) + 1))[:length]


def spoilt(frames: Frames, other: Frames, fps: float) -> dict[str, Frames]:
    """The clip as it is, and every known way to spoil it (`other`: a clip of another scene to cut to)."""
    return {
        "correct": frames,
        "wobble 1 px": wobble(frames, 1),
        "wobble 4 px": wobble(frames, 4),
        "hard cut": hard_cut(frames, other),
        "blurred": blurred(frames),
        "Ken Burns": ken_burns(frames),
        "still + noise": still_with_noise(frames),
        "frozen": frozen(frames),
        "hand-held": hand_held(frames, fps),
    }
