"""`build_report`: one HTML file that opens from disk, with the videos, the plots and the numbers inside.

Nothing is fetched: plotly.js and the videos are embedded, and the page's content security policy forbids every
connection. Prompts reach the page as JSON text that scripts write with `textContent` only, so a prompt that looks
like markup stays a prompt.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vggrpo.errors import UserError
from vggrpo.evaluation.report_data import arm_manifest, collect, read_scenes
from vggrpo.io.atomic import atomic_write
from vggrpo.io.video import read_video, write_video

PAGE_BUDGET = 14_500_000  # bytes of the whole page
FIXED_PART = 5_300_000  # plotly.js (4.8 MB), the page itself and its numbers
SCENE_BUDGET = 2_500_000  # bytes of the point clouds
SMALL_SIDE = 240  # px, when videos have to be shrunk
SMALL_CRF = 32


def build_report(run_dir: Path | str, *, page_budget: int = PAGE_BUDGET) -> Path:
    """Write `run_dir/report/index.html` from what the run directory holds, and return its path.

    Args:
        run_dir: see `report_data`.
        page_budget: bytes of the page; above it only the first point clouds are kept, videos are shrunk, then only the
            first ones are kept, and the page says so.

    Raises:
        UserError: when the evaluation of an arm is missing, or a file is broken.
    """
    run_dir = Path(run_dir)
    for arm in ("base", "tuned"):
        needed = run_dir / "eval" / arm / "metrics.jsonl"
        if not needed.is_file():
            raise UserError(
                f"{needed} does not exist; run "
                f"`vggrpo evaluate {run_dir / arm / 'manifest.jsonl'} --output {needed.parent}` first"
            )
    scenes, scene_bytes, scenes_left = first_scenes(read_scenes(run_dir), SCENE_BUDGET)
    video_budget = max(0, page_budget - FIXED_PART - scene_bytes) * 3 // 4  # base64 makes four bytes of three
    contents, videos_left = embed_videos(_paired_files(run_dir), video_budget)
    ids = {path: f"v{index}" for index, path in enumerate(contents)}
    data = collect(run_dir, ids, scenes, " ".join(filter(None, (videos_left, scenes_left))) or None)
    encoded = {ids[path]: base64.b64encode(content).decode("ascii") for path, content in contents.items()}
    page = render("report", {"DATA": data, "VIDEOS": encoded})
    return atomic_write(run_dir / "report" / "index.html", page)


def render(template: str, islands: Mapping[str, Any]) -> str:
    """One page that needs no other file.

    Args:
        template: `report` or `reconstruct`: the names of the HTML and the script.
        islands: JSON data by the marker that it takes the place of.
    """
    from plotly.offline import get_plotlyjs  # 0.1 s and 5 MB, only when a report is made

    folder = files("vggrpo.evaluation") / "templates"
    names = {"STYLE": "report.css", "COMMON": "common.js", "SCENE": "scene.js", "SCRIPT": f"{template}.js"}
    page = (folder / f"{template}.html").read_text(encoding="utf-8")
    parts = {name: (folder / file).read_text(encoding="utf-8") for name, file in names.items()}
    parts |= {"PLOTLY": get_plotlyjs(), **{name: json_island(value) for name, value in islands.items()}}
    # One pass over the template only, so that a marker inside the data is never filled in.
    pieces = page.split("%%")
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def json_island(value: Any) -> str:
    """JSON that can stand inside <script type="application/json">: no character of it can end the element or open a
    comment.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def first_scenes(scenes: list[dict[str, Any]], budget: int) -> tuple[list[dict[str, Any]], int, str | None]:
    """The first scenes that fit into `budget` bytes, their size, and what was left out, in words (None: nothing)."""
    kept, used = [], 0
    for scene in scenes:
        size = len(json.dumps(scene))
        if used + size > budget:
            break
        kept.append(scene)
        used += size
    left = len(scenes) - len(kept)
    return kept, used, f"{left} of {len(scenes)} scenes are not shown in 3D." if left else None


def _paired_files(run_dir: Path) -> list[tuple[Path, ...]]:
    """Video files of each (prompt, seed), first seeds of all prompts before second ones."""
    groups: dict[tuple[str, int], list[Path]] = {}
    for arm in ("base", "tuned"):
        for row in arm_manifest(run_dir, arm):
            groups.setdefault((row.prompt, row.seed), []).append(run_dir / arm / row.path)
    seen: dict[str, int] = {}
    ranked = []
    for (prompt, _), paths in groups.items():
        ranked.append((seen.get(prompt, 0), len(ranked), tuple(path for path in paths if path.is_file())))
        seen[prompt] = seen.get(prompt, 0) + 1
    return [paths for _, _, paths in sorted(ranked)]


def embed_videos(groups: list[tuple[Path, ...]], budget: int) -> tuple[dict[Path, bytes], str | None]:
    """Contents to embed within `budget` bytes, and what was shrunk or left out, in words (None: nothing)."""
    if sum(path.stat().st_size for paths in groups for path in paths) <= budget:
        return {path: path.read_bytes() for paths in groups for path in paths}, None
    kept: dict[Path, bytes] = {}
    used, left = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for paths in groups:
            small = {path: _shrink(path, Path(folder)) for path in paths}
            size = sum(map(len, small.values()))
            if left or used + size > budget:
                left += 1
                continue
            kept |= {path: content for path, content in small.items() if content}
            used += size
    note = f"Videos are shown smaller than they are (short side at most {SMALL_SIDE} px) to keep this page light."
    if left:
        note += f" {left} of {len(groups)} pairs are listed without their videos."
    return kept, note


def _shrink(path: Path, folder: Path) -> bytes:
    """A smaller encoding of a video; empty for a broken file, whose row says what is wrong with it."""
    try:
        frames, fps = read_video(path)
    except UserError:
        return b""
    side = min(frames.shape[1:3])
    if side > SMALL_SIDE:
        size = tuple(round(length * SMALL_SIDE / side) for length in (frames.shape[2], frames.shape[1]))
        frames = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
    return min(write_video(folder / "small.mp4", frames, fps, crf=SMALL_CRF).read_bytes(), path.read_bytes(), key=len)
