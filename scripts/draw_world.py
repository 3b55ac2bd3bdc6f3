"""The README's picture of the embedded world: three frames of four clips, inverse depth, masks.

usage: python scripts/draw_world.py docs/images/world.png
"""

from __future__ import annotations

import sys

import cv2
import numpy as np

from vggrpo.world import WorldBatch, sample_batch

SEEDS, SIZE, FRAMES = (3, 8, 21, 34), (128, 128), (0, 8, 16)
MAY_MOVE, MOVES = (255, 160, 80), (60, 120, 255)  # BGR


def row(world: WorldBatch, clip: int) -> np.ndarray:
    """One clip as a strip of five pictures, BGR."""
    frames = [(world.video[clip, :, t].permute(1, 2, 0).numpy()[..., ::-1] * 255).astype(np.uint8) for t in FRAMES]
    inverse = (1 / world.depth[clip, 0].numpy() - 0.12) / 0.45
    depth = cv2.applyColorMap((inverse.clip(0, 1) * 255).astype(np.uint8), cv2.COLORMAP_MAGMA)
    masks = frames[0] // 2
    masks[world.subject_mask[clip, 0].numpy()] = MAY_MOVE
    masks[world.dynamic_mask[clip, 0].numpy()] = MOVES
    return np.hstack([*frames, depth, masks])


if __name__ == "__main__":
    batch = sample_batch(SEEDS, size=SIZE)
    cv2.imwrite(sys.argv[1], np.vstack([row(batch, clip) for clip in range(len(SEEDS))]))
