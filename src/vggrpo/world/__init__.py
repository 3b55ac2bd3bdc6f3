"""The embedded 4D world: procedural rooms with moving objects, rendered with exact truth.

Depth, cameras, flow, masks and captions.
"""

from __future__ import annotations

from vggrpo.world.batch import WorldBatch, sample_batch
from vggrpo.world.captions import (
    CAMERA_MOVES,
    COLOURS,
    MOTION_VERBS,
    ROOMS,
    SHAPES,
    caption_to_attributes,
    sample_prompts,
)

__all__ = [
    "CAMERA_MOVES",
    "COLOURS",
    "MOTION_VERBS",
    "ROOMS",
    "SHAPES",
    "WorldBatch",
    "caption_to_attributes",
    "sample_batch",
    "sample_prompts",
]
