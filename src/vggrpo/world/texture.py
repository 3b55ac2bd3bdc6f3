"""Textures: small images with enough corners to match and little that 64 pixels cannot show."""

from __future__ import annotations

import cv2
import numpy as np

TILE = 128
_BASES = {  # room style -> floor, wall, ceiling colour
    0: ((0.62, 0.42, 0.24), (0.80, 0.68, 0.50), (0.86, 0.80, 0.70)),
    1: ((0.45, 0.45, 0.47), (0.62, 0.62, 0.64), (0.74, 0.74, 0.76)),
    2: ((0.55, 0.66, 0.68), (0.74, 0.84, 0.84), (0.86, 0.90, 0.90)),
    3: ((0.48, 0.36, 0.32), (0.70, 0.42, 0.33), (0.82, 0.76, 0.72)),
    4: ((0.56, 0.54, 0.48), (0.82, 0.80, 0.70), (0.90, 0.88, 0.82)),
}
_COLOURS = {
    "red": (0.85, 0.13, 0.13),
    "green": (0.15, 0.65, 0.2),
    "blue": (0.15, 0.3, 0.88),
    "yellow": (0.93, 0.83, 0.12),
    "purple": (0.56, 0.2, 0.7),
    "orange": (0.95, 0.5, 0.08),
    "white": (0.95, 0.95, 0.95),
}


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise in about [-1, 1] on a TILE x TILE grid with `cells` bumps a side."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (TILE, TILE), interpolation=cv2.INTER_CUBIC)


def _soft(x: np.ndarray, sharpness: float = 2.5) -> np.ndarray:
    return np.tanh(sharpness * x)


def _pattern(rng: np.random.Generator, kind: int) -> np.ndarray:
    """Signed pattern in [-1, 1]: boards, blotches, tiles, bricks or dots."""
    v, u = np.mgrid[0:TILE, 0:TILE] / TILE
    n = int(rng.integers(2, 5))
    phase = rng.uniform(0, 2 * np.pi, 2)
    if kind == 0:
        return _soft(np.sin(2 * np.pi * n * u + phase[0] + 1.2 * _noise(rng, 4)))
    if kind == 1:
        return _soft(_noise(rng, 9), 2.0)
    if kind == 2:
        return _soft(np.sin(np.pi * n * u + phase[0]) * np.sin(np.pi * n * v + phase[1]))
    if kind == 3:
        row = np.floor(v * 2 * n)
        shift = 0.5 * (row % 2)
        edge = np.minimum(np.abs((u * n + shift) % 1 - 0.5), np.abs((v * 2 * n) % 1 - 0.5))
        bricks = 0.7 * np.cos(2.4 * np.floor(u * n + shift) + 4.1 * row) - 1.2 * (edge < 0.09)
        return cv2.GaussianBlur(bricks, (0, 0), 2.0)
    return _soft(np.sin(2 * np.pi * n * u + phase[0]) + np.sin(2 * np.pi * n * v + phase[1]) - 0.6, 2.0)


def room_tiles(rng: np.random.Generator, style: int) -> np.ndarray:
    """Six tiles (6, 3, TILE, TILE) in [0, 1]: x-, x+, ceiling, floor, z-, z+."""
    floor, wall, ceiling = (np.array(c) for c in _BASES[style])
    tiles = []
    for base in (wall, wall, ceiling, floor, wall, wall):
        kind = style if rng.random() < 0.8 else int(rng.integers(0, 5))
        contrast = rng.uniform(0.10, 0.18) * (0.6 if base is ceiling else 1.0)
        tint = np.clip(base + rng.uniform(-0.1, 0.1, 3), 0.1, 0.95)
        shade = contrast * _pattern(rng, kind) + 0.09 * _noise(rng, 7) + 0.04 * _noise(rng, 14) + 0.03 * _noise(rng, 40)
        hue = 0.035 * np.stack([_noise(rng, 5) for _ in range(3)])
        tiles.append(np.clip(tint[:, None, None] * (1 + shade) + hue, 0, 1))
    return np.stack(tiles)


def object_tile(rng: np.random.Generator, colour: str) -> np.ndarray:
    """One tile (3, TILE, TILE): the named colour with darker marks that show rotation."""
    base = np.array(_COLOURS[colour])[:, None, None] * rng.uniform(0.9, 1.05)
    marks = _pattern(rng, int(rng.choice([0, 2, 4]))) > 0.1
    shade = 1 - rng.uniform(0.3, 0.5) * cv2.GaussianBlur(marks.astype(np.float32), (0, 0), 5.0) + 0.05 * _noise(rng, 8)
    return np.clip(base * shade, 0, 1)
