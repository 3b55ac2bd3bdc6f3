"""Scenes: a room, up to three objects that may move, a camera path. Everything follows from one seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vggrpo.world.camera import band_limited_noise, camera_path, rotation
from vggrpo.world.captions import ROOMS, SHAPES, caption, sample_attributes
from vggrpo.world.texture import object_tile, room_tiles

MAX_OBJECTS = 3
FPS = 8.0
# One lens for all clips, in image widths: what cannot be seen in a short clip should not blur depth and pose.
FOCAL = float(0.5 / np.tan(np.radians(80.0) / 2))


class Shake(NamedTuple):
    """How steady clips are.

    Attributes:
        share: of the clips that are hand-held.
        strength: how much those shake, as a multiple of what networks that read geometry are trained on.
    """

    share: float
    strength: float = 1.0


# "footage" is what the generator learns from: it damps the shake that it has seen, and so it sees more of it.
SHAKE = {"smooth": Shake(0.0), "handheld": Shake(1.0), "mixed": Shake(0.4), "footage": Shake(0.6, 2.0)}


@dataclass
class Scene:
    """One clip before rendering, in the room frame (metres, y down, floor at y = 0). T frames, N = MAX_OBJECTS.

    Attributes:
        room: (2, 3) lower and upper corner of the room.
        cam2room: (T, 4, 4).
        focal: focal length in units of the image width.
        shape: (N,) index into SHAPES, -1 = no object.
        half_size: (N, 3) half extents (ball: radius in all; cylinder: radius, half height, radius).
        pose: (N, T, 4, 4) object to room.
        moves: (N,) whether the object moves in this clip.
        atlas: (6 + N, 3, A, A) textures in [0, 1]: x-, x+, ceiling, floor, z-, z+, then the objects.
        handheld: whether the camera shakes.
    """

    room: np.ndarray
    cam2room: np.ndarray
    focal: float
    shape: np.ndarray
    half_size: np.ndarray
    pose: np.ndarray
    moves: np.ndarray
    atlas: np.ndarray
    light: np.ndarray
    handheld: bool
    attributes: dict
    caption: str


def sample_scene(
    seed: int, *, num_frames: int = 17, shake: str = "mixed", camera: str | None = None, split: str | None = None
) -> Scene:
    """Draw a scene. `shake`: how steady it is, a name in `SHAKE`; `camera`: force a move."""
    if shake not in SHAKE:
        raise ValueError(f"shake must be one of {', '.join(SHAKE)}, got {shake!r}")
    share, strength = SHAKE[shake]
    rng = np.random.default_rng(seed)
    attributes = sample_attributes(rng, split, camera)
    text = caption(attributes, rng)
    atlas = np.concatenate(
        [
            room_tiles(rng, ROOMS.index(attributes["room"])),
            np.stack([object_tile(rng, o["colour"]) for o in attributes["objects"]]),
        ]
    )
    atlas = np.concatenate([atlas, np.zeros((6 + MAX_OBJECTS - len(atlas), *atlas.shape[1:]))]).astype(np.float32)
    handheld = bool(rng.random() < share)
    # The shake has its own stream, so that the same seed gives the same scene smooth and hand-held.
    shake_rng = np.random.default_rng([seed, 1])
    for attempt in range(4000):
        layout = _try_layout(rng, attributes, num_frames, ease=min(attempt / 300, 1.0))
        if layout is not None:
            break
    else:
        raise RuntimeError(f"no collision-free layout for seed {seed}")
    room, shape, half, pose, moves, position, yaw, pitch = layout
    roll = np.zeros(num_frames)
    if handheld:
        noise = band_limited_noise(shake_rng, num_frames, FPS, 6)
        position = position + noise[:, :3] * strength * shake_rng.uniform(0.03, 0.10)
        angle = strength * np.radians(shake_rng.uniform(0.6, 2.4)) * noise[:, 3:]
        yaw, pitch, roll = yaw + angle[:, 0], pitch + angle[:, 1], roll + 0.7 * angle[:, 2]
    cam2room = np.tile(np.eye(4), (num_frames, 1, 1))
    cam2room[:, :3, :3], cam2room[:, :3, 3] = rotation(yaw, pitch, roll), position
    light = np.array([rng.uniform(-0.5, 0.5), -1.0, rng.uniform(-0.7, 0.1)])
    return Scene(
        room,
        cam2room,
        FOCAL,
        shape,
        half,
        pose,
        moves,
        atlas,
        light / np.linalg.norm(light),
        handheld,
        attributes,
        text,
    )


def _try_layout(rng: np.random.Generator, attributes: dict, frames: int, ease: float) -> tuple | None:
    """One attempt at room, objects and camera path; None when something would touch. `ease` shrinks all moves."""
    width, depth, height = rng.uniform(5.4, 6.8), rng.uniform(6.4, 7.8), rng.uniform(2.9, 3.3)
    room = np.array([[-width / 2, -height, 0.0], [width / 2, 0.0, depth]])
    shrink = 1.0 - 0.6 * ease
    progress = np.linspace(0, 1, frames)
    smooth = progress * progress * (3 - 2 * progress)
    blend = rng.uniform(0.0, 0.35)
    progress = (1 - blend) * progress + blend * smooth
    middle = np.array([rng.uniform(-0.7, 0.7), -rng.uniform(1.3, 1.7), rng.uniform(1.7, 2.3)])
    yaw, pitch = rng.uniform(-0.25, 0.25), rng.uniform(-0.22, -0.02)
    amounts = {
        "dolly": rng.uniform(1.7, 3.0),
        "truck": rng.uniform(1.5, 2.7),
        "pedestal": rng.uniform(0.9, 1.5),
        "pan": np.radians(rng.uniform(28, 52)),
        "tilt": np.radians(rng.uniform(18, 32)),
        "orbit": np.radians(rng.uniform(36, 66)),
    }
    amounts = {name: value * shrink for name, value in amounts.items()}
    # Moves are centred: half of the way has been gone when the camera stands in the middle, looking ahead.
    position, yaws, pitches = camera_path(
        attributes["camera"], middle, yaw, pitch, rng.uniform(2.2, 3.0), progress - 0.5, amounts
    )
    if (position < room[0] + 0.35).any() or (position > room[1] - 0.35).any():
        return None
    placed = _place_objects(rng, attributes["objects"], room, middle, yaw, frames, shrink)
    if placed is None:
        return None
    shape, half, pose, moves = placed
    for k, radius in enumerate(np.linalg.norm(half[:, [0, 2]], axis=-1)):
        if shape[k] >= 0:
            gap = np.linalg.norm(pose[k][:, None, :3, 3] - position[None], axis=-1).min()
            if gap < radius + 0.7:
                return None
    return room, shape, half, pose, moves, position, yaws, pitches


def _place_objects(
    rng: np.random.Generator,
    objects: list[dict],
    room: np.ndarray,
    middle: np.ndarray,
    yaw: float,
    frames: int,
    shrink: float,
) -> tuple | None:
    shape = np.full(MAX_OBJECTS, -1)
    half = np.full((MAX_OBJECTS, 3), 0.1)
    pose = np.tile(np.eye(4), (MAX_OBJECTS, frames, 1, 1))
    moves = np.zeros(MAX_OBJECTS, bool)
    for k, item in enumerate(objects):
        shape[k] = SHAPES.index(item["shape"])
        r, h = rng.uniform(0.34, 0.58), rng.uniform(0.36, 0.7)
        half[k] = {"ball": (r, r, r), "box": (r, h, rng.uniform(0.34, 0.58)), "cylinder": (0.8 * r, h, 0.8 * r)}[
            item["shape"]
        ]
        distance, angle = rng.uniform(1.9, 3.9), yaw + rng.uniform(-0.55, 0.55)
        centre = np.array([middle[0] + distance * np.sin(angle), -half[k, 1], middle[2] + distance * np.cos(angle)])
        pose[k] = _object_motion(rng, item["motion"], item["shape"], centre, half[k], room, frames, shrink)
        moves[k] = item["motion"] is not None
        reach = np.linalg.norm(half[k, [0, 2]])
        path = pose[k, :, :3, 3]
        if (path[:, [0, 2]] < room[0, [0, 2]] + reach + 0.05).any() or (
            path[:, [0, 2]] > room[1, [0, 2]] - reach - 0.05
        ).any():
            return None
        for other in range(k):
            gap = np.linalg.norm((path - pose[other, :, :3, 3])[:, [0, 2]], axis=-1).min()
            if gap < reach + np.linalg.norm(half[other, [0, 2]]):
                return None
    return shape, half, pose, moves


def _object_motion(
    rng: np.random.Generator,
    motion: str | None,
    shape: str,
    centre: np.ndarray,
    half: np.ndarray,
    room: np.ndarray,
    frames: int,
    shrink: float,
) -> np.ndarray:
    """Object poses (T, 4, 4) in the room: still, rolling or sliding along the floor, or swinging under the ceiling."""
    pose = np.tile(np.eye(4), (frames, 1, 1))
    spin = 0.0 if shape == "ball" else rng.uniform(-np.pi, np.pi)
    base = rotation(np.array(spin), np.array(0.0))
    pose[:, :3, :3], pose[:, :3, 3] = base, centre
    time = np.arange(frames) / FPS
    heading = rng.choice([-1, 1]) * np.pi / 2 + rng.uniform(-0.6, 0.6)  # mostly across the picture
    direction = np.array([np.sin(heading), 0.0, np.cos(heading)])
    if motion in ("rolls", "slides"):
        travel = rng.uniform(0.7, 1.5) * shrink * (time / time[-1] - 0.5 if frames > 1 else time)
        pose[:, :3, 3] = centre + travel[:, None] * direction
        if motion == "rolls":
            pose[:, :3, :3] = _about(np.cross(direction, [0.0, 1.0, 0.0]), -travel / half[0]) @ base
    elif motion == "swings":
        length = max(-room[0, 1] - half[1] - rng.uniform(0.35, 0.7), 0.8)
        angle = (
            np.radians(rng.uniform(14, 26))
            * shrink
            * np.sin(2 * np.pi * time / rng.uniform(2.0, 3.2) + rng.uniform(0, 2 * np.pi))
        )
        pivot = np.array([centre[0], room[0, 1], centre[2]])
        turn = _about(np.cross(direction, [0.0, 1.0, 0.0]), angle)
        pose[:, :3, 3] = pivot + turn @ np.array([0.0, length, 0.0])
        pose[:, :3, :3] = turn @ base
    return pose


def _about(axis: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rotations (T, 3, 3) by `angle` (T,) about a unit `axis` (Rodrigues)."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    s, c = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    return np.eye(3) + s * cross + (1 - c) * (cross @ cross)
