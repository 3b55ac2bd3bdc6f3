"""`build_report`: one HTML file that opens from disk, with the videos, the plots and the numbers inside.

Nothing is fetched: plotly.js and the videos are embedded, and the page's content security policy forbids every
connection. Prompts reach the page as JSON text that scripts write with `textContent` only, so a prompt that looks
like markup stays a prompt.
"""

from __future__ import annotations

import base64
import json
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vggrpo.errors import UserError
from vggrpo.evaluation.report_data import arm_manifest, collect
from vggrpo.io.atomic import atomic_write
from vggrpo.io.video import read_video, write_video

VIDEO_BUDGET = 6_800_000  # bytes before base64; with plotly.js (4.8 MB) the page stays under 15 MB
SMALL_SIDE = 240  # px, when videos have to be shrunk
SMALL_CRF = 32


def build_report(run_dir: Path | str, *, video_budget: int = VIDEO_BUDGET) -> Path:
    """Write `run_dir/report/index.html` from what the run directory holds, and return its path.

    Args:
        run_dir: see `report_data`.
        video_budget: bytes of video to embed; above it videos are shrunk, then only the first ones are kept, and the
            page says so.

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
    contents, left_out = embed_videos(_paired_files(run_dir), video_budget)
    ids = {path: f"v{index}" for index, path in enumerate(contents)}
    data = collect(run_dir, ids, left_out)
    encoded = {ids[path]: base64.b64encode(content).decode("ascii") for path, content in contents.items()}
    return atomic_write(run_dir / "report" / "index.html", render(data, encoded))


def render(data: dict[str, Any], videos: dict[str, str]) -> str:
    """The page's HTML from its data and its base64 videos."""
    from plotly.offline import get_plotlyjs  # 0.1 s and 5 MB, only when a report is made

    folder = files("vggrpo.evaluation") / "templates"
    page = (folder / "report.html").read_text(encoding="utf-8")
    parts = {
        "STYLE": (folder / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": (folder / "report.js").read_text(encoding="utf-8"),
        "PLOTLY": get_plotlyjs(),
        "DATA": json_island(data),
        "VIDEOS": json_island(videos),
    }
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
