"""The geometry of one clip as plain data: a coloured point cloud that knows what moves, and the cameras.

`cloud_of` keeps the pixels that mean something (finite, confident, away from depth edges); `scene_of` thins the cloud
and packs it for a page: 16-bit coordinates, so that a thousand points cost ten kilobytes.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8

from vggrpo.geometry import GeometryPrediction
from vggrpo.geometry.edges import depth_edges
from vggrpo.io.manifest import write_jsonl

CONFIDENCE = 0.1  # as in the reprojection reward
SCENE_POINTS = 1500  # of a clip in the report
STATIC = 0xFFFF  # in place of a view's number: the point belongs to all views


@dataclass(frozen=True)
class Cloud:
    """Points of all views of one clip, world frame (the first camera's)."""

    points: Float[np.ndarray, "N 3"]
    colours: UInt8[np.ndarray, "N 3"]
    view: Int[np.ndarray, " N"]
    """Which view saw the point."""
    moving: Bool[np.ndarray, " N"]
    """Belongs to something that moves, so it is true at its own view's time only."""


def view_colours(frames: UInt8[np.ndarray, "S H0 W0 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "S H W 3"]:
    """Frames at the size (height, width) of the geometry's maps."""
    if frames.shape[1:3] == size:
        return frames
    return np.stack([cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA) for frame in frames])


def cloud_of(
    prediction: GeometryPrediction, colours: UInt8[np.ndarray, "S H W 3"], *, confidence: float = CONFIDENCE
) -> Cloud:
    """The cloud of one clip (B = 1).

    Args:
        colours: of the views, at the size of the maps.
        confidence: pixels under it are left out.
    """
    points = prediction.points[0]  # (S, H, W, 3)
    keep = torch.isfinite(points).all(-1) & (prediction.conf[0] > confidence) & ~depth_edges(prediction.depth[0])
    moving = torch.zeros_like(keep) if prediction.dynamic_mask is None else prediction.dynamic_mask[0]
    chosen = keep.cpu().numpy()
    return Cloud(
        points=points.float().cpu().numpy()[chosen],
        colours=colours[chosen],
        view=np.nonzero(chosen)[0],
        moving=moving.cpu().numpy()[chosen],
    )


def scene_of(
    prediction: GeometryPrediction, frames: UInt8[np.ndarray, "S H0 W0 3"], *, by: str, most: int = SCENE_POINTS
) -> dict[str, Any]:
    """One clip (B = 1) as JSON data for the page's 3D view.

    Args:
        frames: the views' frames, of any size.
        by: who saw this geometry, in words.
        most: points kept, drawn with a fixed seed.

    Returns:
        `by`, `metric`, `frames` (indices), `cameras` (S rows of 12: the 3x4 of cam2world), `fov` (tangents of half the
        field of view, x and y), and `points` {n, centre, scale, xyz, rgb, view}: base64 of int16, uint8 and uint16,
        with coordinates `centre + scale * xyz`.
    """
    cloud = cloud_of(prediction, view_colours(frames, prediction.size))
    chosen = np.arange(len(cloud.points))
    if len(chosen) > most:
        chosen = np.sort(np.random.default_rng(0).choice(len(chosen), most, replace=False))
    assert prediction.frame_index is not None  # set by the prediction itself
    cam2world = prediction.cam2world[0, :, :3].double().cpu().numpy()  # (S, 3, 4)
    height, width = prediction.size
    focal = prediction.intrinsics[0, 0].double().cpu().numpy()
    return {
        "by": by,
        "metric": prediction.is_metric,
        "frames": prediction.frame_index.tolist(),
        "cameras": np.round(cam2world.reshape(len(cam2world), 12), 4).tolist(),
        "fov": [round(width / 2 / focal[0, 0], 4), round(height / 2 / focal[1, 1], 4)],
        "points": _packed(cloud, chosen),
    }


def write_scenes(path: Path, scenes: Iterable[tuple[str, int, dict[str, Any]]]) -> Path:
    """Write (prompt, seed, scene) as JSON lines, where `build_report` looks for them: `RUN/scenes/ARM.jsonl`."""
    return write_jsonl(path, ({"prompt": prompt, "seed": seed, **scene} for prompt, seed, scene in scenes))


def _packed(cloud: Cloud, chosen: Int[np.ndarray, " K"]) -> dict[str, Any]:
    points = cloud.points[chosen].astype(np.float64)
    if not len(points):
        return {"n": 0, "centre": [0.0, 0.0, 0.0], "scale": 1.0, "xyz": "", "rgb": "", "view": ""}
    centre = np.median(points, axis=0)
    # A few stray points must not cost all others their resolution: what lies outside is moved to the rim.
    reach = max(float(np.quantile(np.abs(points - centre).max(axis=1), 0.995)), 1e-6)
    xyz = np.rint(np.clip((points - centre) / reach, -1, 1) * 32767).astype("<i2")
    view = np.where(cloud.moving[chosen], cloud.view[chosen], STATIC).astype("<u2")
    return {
        "n": len(points),
        "centre": [round(float(value), 5) for value in centre],
        "scale": reach / 32767,
        "xyz": _text(xyz),
        "rgb": _text(cloud.colours[chosen]),
        "view": _text(view),
    }


def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
