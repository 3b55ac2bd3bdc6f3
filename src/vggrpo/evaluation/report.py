"""`build_report`: one HTML file that opens from disk, with the videos, the plots and the numbers inside.

Nothing is fetched: plotly.js and the videos are embedded, and the page's content security policy forbids every
connection. Prompts reach the page as JSON text that scripts write with `textContent` only, so a prompt that looks
like markup stays a prompt.
"""

from __future__ import annotations

import base64
import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vggrpo.errors import UserError
from vggrpo.evaluation.metrics.quality import KernelComparison
from vggrpo.evaluation.report_data import arm_manifest, collect, read_scenes
from vggrpo.io.atomic import atomic_write
from vggrpo.io.video import decode_video, write_video

PAGE_BUDGET = 14_500_000  # bytes of the whole page
FIXED_PART = 5_300_000  # plotly.js (4.8 MB), the page itself and its numbers
SCENE_BUDGET = 2_500_000  # bytes of the point clouds
# Short side (px) and x264 quality of videos that have to be shrunk, the first that fits; below the last one nothing of
# the scene is left to see.
SIZES = ((240, 30), (240, 34), (192, 36), (160, 38), (128, 40), (96, 42))
LEAST_PART = 40_000  # bytes for the two videos of one prompt and seed


def build_report(
    run_dir: Path | str, *, kernel: KernelComparison | None = None, page_budget: int = PAGE_BUDGET
) -> Path:
    """Write `run_dir/report/index.html` from what the run directory holds, and return its path.

    Args:
        run_dir: see `report_data`.
        kernel: the arms' distances to rendered clips, where `summary.json` doesn't hold them.
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
    left_out = " ".join(filter(None, (videos_left, scenes_left))) or None
    data = collect(run_dir, ids, scenes, left_out, kernel)
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
    """Contents to embed within `budget` bytes, and what was shrunk or left out, in words (None: nothing).

    Where all of them are too much, each group (the videos of one prompt and seed) may take an equal part of what is
    left, and its videos are made smaller alike until they fit; a part of less than `LEAST_PART` helps nobody, so that
    of very many groups only the first ones are kept.
    """
    if sum(path.stat().st_size for paths in groups for path in paths) <= budget:
        return {path: path.read_bytes() for paths in groups for path in paths}, None
    kept: dict[Path, bytes] = {}
    room, left = budget, 0
    with tempfile.TemporaryDirectory() as folder:
        for index, paths in enumerate(groups):
            part = min(room, max(LEAST_PART, room // (len(groups) - index)))
            small = None if left else _fitting(paths, part, Path(folder) / "small.mp4")
            if small is None:
                left += 1
                continue
            kept |= small
            room -= sum(map(len, small.values()))
    note = f"Videos are shown smaller than they are (short side at most {SIZES[0][0]} px) to keep this page light."
    if left:
        note += f" {left} of {len(groups)} pairs are listed without their videos."
    return kept, note


def _fitting(paths: Sequence[Path], budget: int, scratch: Path) -> dict[Path, bytes] | None:
    """The videos of one group in the largest of `SIZES` in which all fit, or None; broken files, whose rows say what is
    wrong with them, are left out.
    """
    videos = {}
    for path in paths:
        with contextlib.suppress(UserError):
            video = decode_video(path, most_lines=lambda *_: SIZES[0][0])
            videos[path] = (video.frames, video.fps)
    for side, crf in SIZES:
        found = {path: _shrunk(path, *video, side, crf, scratch) for path, video in videos.items()}
        if sum(map(len, found.values())) <= budget:
            return found
    return None


def _shrunk(path: Path, frames: NDArray[np.uint8], fps: float, side: int, crf: int, scratch: Path) -> bytes:
    """The video with a short side of at most `side` pixels, or the file itself where that is lighter."""
    height, width = frames.shape[1:3]
    if min(height, width) > side:
        size = tuple(round(length * side / min(height, width)) for length in (width, height))
        frames = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
    encoded = write_video(scratch, frames, fps, crf=crf).read_bytes()
    return encoded if len(encoded) < path.stat().st_size else path.read_bytes()
