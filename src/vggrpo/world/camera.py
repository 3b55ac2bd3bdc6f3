"""Camera paths: the moves a caption names, and the shake of a hand that it does not name.

Room frame: x right, y down, z ahead of the first camera's room axis; metres. Rotation = yaw about y, then pitch about
x.
"""

from __future__ import annotations

import numpy as np


def rotation(yaw: np.ndarray, pitch: np.ndarray, roll: np.ndarray | float = 0.0) -> np.ndarray:
    """R = Ry(yaw) Rx(pitch) Rz(roll), (..., 3, 3), radians; positive yaw looks right, positive pitch looks up."""
    yaw, pitch, roll = np.broadcast_arrays(yaw, pitch, roll)
    return _axis(yaw, 1) @ _axis(pitch, 0) @ _axis(roll, 2)


def _axis(angle: np.ndarray, axis: int) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    out = np.zeros((*np.shape(angle), 3, 3))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    out[..., axis, axis] = 1.0
    out[..., i, i] = out[..., j, j] = c
    out[..., i, j], out[..., j, i] = -s, s
    return out


def camera_path(
    moves: list[str],
    start: np.ndarray,
    yaw: float,
    pitch: float,
    target_distance: float,
    progress: np.ndarray,
    amounts: dict[str, float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (T, 3), yaw (T,) and pitch (T,) of a smooth path.

    Args:
        moves: names of `captions.CAMERA_MOVES`; effects add up.
        progress: (T,) from 0 to 1, the speed profile.
        amounts: metres or radians for each kind of move (`dolly`, `truck`, `pedestal`, `pan`, `tilt`, `orbit`).
    """
    position = np.repeat(start[None], len(progress), 0)
    yaws, pitches = np.full(len(progress), yaw), np.full(len(progress), pitch)
    forward = np.array([np.sin(yaw), 0.0, np.cos(yaw)])
    right = np.array([np.cos(yaw), 0.0, -np.sin(yaw)])
    for move in moves:
        kind, _, direction = move.partition("_")
        amount = amounts.get(kind, 0.0) * progress
        sign = -1.0 if direction in ("left", "out", "down") else 1.0
        if kind == "dolly":
            position = position + sign * amount[:, None] * forward
        elif kind == "truck":
            position = position + sign * amount[:, None] * right
        elif kind == "pedestal":
            position = position + sign * amount[:, None] * np.array([0.0, -1.0, 0.0])
        elif kind == "pan":
            yaws = yaws + sign * amount
        elif kind == "tilt":
            pitches = pitches + sign * amount
        elif kind == "orbit":  # move sideways around a point ahead and keep looking at it
            angle = -sign * amount
            ahead = start + target_distance * forward
            back = np.stack([np.sin(yaw + angle), np.zeros_like(angle), np.cos(yaw + angle)], -1)
            position = position + (ahead - target_distance * back) - start
            yaws = yaws + angle
    return position, yaws, pitches


def band_limited_noise(
    rng: np.random.Generator,
    frames: int,
    fps: float,
    channels: int,
    low_hz: float = 0.7,
    high_hz: float = 2.5,
    waves: int = 4,
) -> np.ndarray:
    """Unit-variance shake (T, channels): a few sines between `low_hz` and `high_hz`, zero at frame 0.

    A hand is not white noise: its power sits between one and three oscillations a second.
    """
    time = np.arange(frames)[:, None, None] / fps
    frequency = rng.uniform(low_hz, high_hz, (1, waves, channels))
    phase = rng.uniform(0, 2 * np.pi, (1, waves, channels))
    noise = np.sin(2 * np.pi * frequency * time + phase).sum(1) * np.sqrt(2.0 / waves)
    return noise - noise[:1]
