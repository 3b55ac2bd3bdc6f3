"""Pictures of the studies, in panels: curves of reward hacking and of noise, bars of costs and of errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vggrpo.io.atomic import atomic_write

WIDTH, HEIGHT, MARGIN = 300, 190, 46
_COLOURS = ((180, 90, 30), (40, 40, 200), (60, 140, 40), (150, 60, 150))  # BGR
_GREY, _BLACK = (170, 170, 170), (30, 30, 30)
MOTION = "motion, tuned / base"  # a watch of the study of hacking
Points = Sequence[tuple[float, float | None]]
_WAYS = {"lgm": "LGM", "decode_then_rgb": "decode, then RGB"}
_FROM_LOG = (
    ("travel, moving, subject pixels / base",
     {"camera_travel_ratio": "travel", "dynamic_share_ratio": "moving", "subject_share_ratio": "subjects"},
     ("camera travel", "share of moving pixels", "share of subject pixels")),
    ("KL to the base model", {"kl": "kl"}, ("KL",)),
)  # fmt: skip
_FROM_VIDEOS = (
    "motion_reward",
    "geometry_reward",
    "epipolar_inliers",
    "judge_reprojection",
    "adherence",
    "motion_flow",
)


def draw_hacking(path: Path, arms: Mapping[str, Any], limits: Mapping[str, float]) -> None:
    """Write the picture: dashes are thresholds, upright lines the first call of the watch."""
    panels = [_panels(name, found, limits) for name, found in arms.items()]
    write_picture(path, stacked([half for row in panels for half in (row[:4], row[4:])]))


def write_picture(path: Path, picture: np.ndarray) -> Path:
    """Write (H, W, 3) uint8 BGR as PNG, all of it or nothing."""
    return atomic_write(path, cv2.imencode(".png", picture)[1].tobytes())


def noise_panels(noise: Mapping[str, Any]) -> list[np.ndarray]:
    """The paper's figure 5: for each error a panel against the noise on latents, the LGM and decode, then RGB."""
    return [
        panel(
            f"{name} against noise on latents",
            {words: list(zip(noise["levels"], noise[who][name], strict=True)) for who, words in _WAYS.items()},
            [],
            [],
            unit="noise",
        )
        for name in noise["lgm_better_from"]
    ]


def cost_panels(shape: str, paths: Mapping[str, Any]) -> list[np.ndarray]:
    """What the geometry of one clip costs by each path: operations, and seconds where they were measured.

    Whole training steps would dwarf the bars; they are in the table.
    """
    tera = {path: row["flops"] / 1e12 for path, row in paths.items() if "latent_share" not in row}
    seconds = {path: row["seconds"] for path, row in paths.items() if row.get("seconds") is not None}
    return [bars(f"TFLOP: {shape}", tera), *([bars(f"seconds: {shape}", seconds)] if seconds else [])]


def error_panels(accuracies: Mapping[str, Any], errors: Sequence[str]) -> list[np.ndarray]:
    """For each error a panel: every LGM's as a multiple of the RGB model's, which is the dashed line."""
    return [
        bars(f"{name}, of the RGB model's", {lgm: found["ratio"].get(name) for lgm, found in accuracies.items()}, 1.0)
        for name in errors
    ]


def stacked(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Rows of panels as one picture, the shorter ones filled up with white."""
    lines = [np.concatenate(row, axis=1) for row in rows]
    widest = max(line.shape[1] for line in lines)
    filled = [np.pad(line, ((0, 0), (0, widest - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    return np.concatenate(filled, axis=0)


def _panels(arm: str, found: Mapping[str, Any], limits: Mapping[str, float]) -> list[np.ndarray]:
    panels = []
    for title, columns, names in _FROM_LOG:
        curves = {words: _numbered(found["log"].get(column, [])) for column, words in columns.items()}
        calls = [found["watches"][name]["crossed"] for name in names]
        panels.append(panel(f"{arm}: {title}", curves, [limits[name] for name in names], calls))
    marks = [0, *found["marks"]]
    for metric in _FROM_VIDEOS:
        curves = {}
        for prompt_set, row in found["sets"].items():
            entries = [mark["metrics"].get(metric) for mark in row["marks"]]
            base = entries[0]["base"] if entries and entries[0] else None
            values = [base, *(None if entry is None else entry["tuned"] for entry in entries)]
            curves[prompt_set] = list(zip(marks, values, strict=True))
        watch = MOTION if metric == "motion_flow" else metric
        calls = [found["watches"][watch]["crossed"]] if watch in found["watches"] else []
        panels.append(panel(f"{arm}: {metric}", curves, [], calls))
    return panels


def _numbered(values: Sequence[float | None]) -> Points:
    return [(i + 1, value) for i, value in enumerate(values)]


def panel(
    title: str,
    curves: Mapping[str, Points],
    limits: Sequence[float],
    calls: Sequence[int | None],
    unit: str = "updates",
) -> np.ndarray:
    """One diagram (HEIGHT, WIDTH, 3) uint8 BGR.

    Args:
        curves: by name, (x, value), x in `unit`; None is left out.
        limits: horizontal dashes.
        calls: upright lines; None is left out.
    """
    canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    _text(canvas, title, 6, 14)
    known = {name: [(x, y) for x, y in points if y is not None] for name, points in curves.items()}
    values = [y for points in known.values() for _, y in points] + [*limits]
    last = max([x for points in known.values() for x, _ in points], default=1)
    if not values:
        _text(canvas, "not measured", 90, HEIGHT // 2)
        return canvas
    low, high = min(values), max(values)
    extent = (high - low) or abs(high) or 1.0

    def at(x: float, y: float) -> tuple[int, int]:
        across = MARGIN + x / last * (WIDTH - MARGIN - 12)
        return int(across), int(HEIGHT - 34 - (y - low) / extent * (HEIGHT - 64))

    cv2.line(canvas, (MARGIN, HEIGHT - 28), (WIDTH - 8, HEIGHT - 28), _GREY, 1)
    for y in (low, high):
        _text(canvas, f"{y:.3g}", 2, at(0, y)[1] + 4)
    _text(canvas, f"{last:g} {unit}", WIDTH - 8 - 7 * len(f"{last:g} {unit}"), HEIGHT - 8)
    for limit in limits:
        for x in range(MARGIN, WIDTH - 12, 10):
            cv2.line(canvas, (x, at(0, limit)[1]), (x + 5, at(0, limit)[1]), _GREY, 1)
    for call in [call for call in calls if call is not None]:
        cv2.line(canvas, (at(call, low)[0], 20), (at(call, low)[0], HEIGHT - 28), _BLACK, 1)
    for place, (name, points) in enumerate(known.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        pixels = np.array([at(x, y) for x, y in points], np.int32).reshape(-1, 1, 2)
        cv2.polylines(canvas, [pixels], False, colour, 1, cv2.LINE_AA)
        left = MARGIN + 6 + (WIDTH - MARGIN - 6) // len(known) * place
        _text(canvas, name, left, HEIGHT - 8 if len(known) == 1 else 28, colour)
    return canvas


def bars(title: str, values: Mapping[str, float | None], limit: float | None = None) -> np.ndarray:
    """One diagram (HEIGHT, WIDTH, 3) uint8 BGR of bars from zero.

    Args:
        values: by name, not negative; None is said to be not measured.
        limit: an upright dashed line.
    """
    canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    _text(canvas, title, 6, 14)
    left, right, row = 116, WIDTH - 58, (HEIGHT - 36) // max(1, len(values))
    highest = max([value for value in (*values.values(), limit) if value is not None], default=0.0) or 1.0

    def at(value: float) -> int:
        return int(left + value / highest * (right - left))

    for place, (name, value) in enumerate(values.items()):
        middle = 30 + row * place + row // 2
        _text(canvas, name, 6, middle + 4)
        if value is None:
            _text(canvas, "not measured", left + 4, middle + 4)
            continue
        colour, half = _COLOURS[place % len(_COLOURS)], min(8, row // 3)
        cv2.rectangle(canvas, (left, middle - half), (at(value), middle + half), colour, cv2.FILLED)
        _text(canvas, f"{value:.3g}", at(value) + 4, middle + 4)
    if limit is not None:
        for y in range(26, HEIGHT - 6, 10):
            cv2.line(canvas, (at(limit), y), (at(limit), y + 5), _BLACK, 1)
    return canvas


def _text(canvas: np.ndarray, text: str, x: int, y: int, colour: tuple[int, int, int] = _BLACK) -> None:
    cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.36, colour, 1, cv2.LINE_AA)
