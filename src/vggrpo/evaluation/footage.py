"""From a manifest or a folder to clips in memory, each within a bound of memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vggrpo.errors import UserError
from vggrpo.evaluation.metrics.base import Clip
from vggrpo.io.manifest import ManifestRow, read_manifest, write_manifest
from vggrpo.io.video import decode_video, frame_rate

MOST_FRAMES = 1200  # a minute at 20 fps; what is longer is refused
MOST_BYTES = 800_000_000  # of the frames of one clip; above it they are scaled down while they are decoded
LINES = (1080, 720, 480)  # short sides to scale to; no metric but sharpness looks at more than 480
UNEVEN = 0.5  # relative deviation of a time step from the median step that makes a frame rate variable


def listed(source: Path, output: Path) -> tuple[list[ManifestRow], Path]:
    """Manifest rows and the directory their paths are relative to; for a folder, `output/manifest.jsonl` is written.

    Raises:
        UserError: no manifest, no videos, or two videos with one prompt, seed and arm.
    """
    if source.is_dir():
        manifest = write_manifest(output / "manifest.jsonl", _rows_of_folder(source, output))
        return read_manifest(manifest), output
    rows = read_manifest(source)
    seen: dict[tuple[str, int, str], str] = {}
    for row in rows:
        unit = (row.prompt, row.seed, row.arm)
        if unit in seen:
            raise UserError(
                f"{source}: {seen[unit]!r} and {row.path!r} have the same prompt, seed {row.seed} and arm {row.arm!r}; "
                "give them different seeds"
            )
        seen[unit] = row.path
    return rows, source.parent


def _rows_of_folder(folder: Path, output: Path) -> Iterable[ManifestRow]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".mp4" and file.is_file())
    if not files:
        raise UserError(f"the folder {folder} holds no .mp4 file; name a manifest or a folder of videos")
    for file in files:
        path = os.path.relpath(file.resolve(), output.resolve())
        yield ManifestRow(path, file.stem, 0, _rate_or_any(file), folder.resolve().name)


def _rate_or_any(file: Path) -> float:
    try:
        return frame_rate(file)
    except UserError:
        return 24.0  # only fills the field: the file can't be opened, its row will say so


def load_clip(row: ManifestRow, file: Path) -> Clip:
    """The clip of one manifest row; the manifest's frame rate is the one that counts.

    Frames that are not evenly spaced in time are resampled to a constant rate, and the clip's note says so: there the
    file's time stamps count.

    Raises:
        UserError: a file that can't be read, that is too long, or whose time stamps don't run forward.
    """
    video = decode_video(file, max_frames=MOST_FRAMES + 1, most_lines=_most_lines)
    if len(video.frames) > MOST_FRAMES:
        raise UserError(f"{row.path} has more than {MOST_FRAMES} frames; cut it into shorter clips")
    steps = np.diff(video.times)
    if steps.size and np.abs(steps - np.median(steps)).max() > UNEVEN * np.median(steps):
        if steps.min() < 0 or np.median(steps) <= 0:
            raise UserError(f"the time stamps of {row.path} don't run forward; re-encode it (ffmpeg -i IN OUT)")
        frames, rate = _evenly_spaced(video.frames, video.times)
        note = f"variable frame rate (steps of {1000 * steps.min():.0f} to {1000 * steps.max():.0f} ms)"
        note += f": resampled to {rate:.4g} frames a second by its time stamps"
        return Clip(frames, rate, row.prompt, row.seed, note=note)
    truth = file.with_suffix(".npz")
    return Clip(video.frames, row.fps, row.prompt, row.seed, truth if truth.is_file() else None)


def _evenly_spaced(frames: NDArray[np.uint8], times: NDArray[np.float64]) -> tuple[NDArray[np.uint8], float]:
    """The frame (of T) nearest to each tick of a clock that ticks as often as the median step, and the clock's rate.

    Where frames are missing, the nearest one stands for them, as a player would show it; the rate is lowered where a
    long gap would fill the memory.
    """
    most = min(MOST_FRAMES, max(len(frames), MOST_BYTES // frames[0].nbytes))
    length = float(times[-1] - times[0])
    rate = min(1 / float(np.median(np.diff(times))), (most - 1) / length)
    ticks = times[0] + np.arange(int(length * rate + 1e-6) + 1) / rate
    right = np.clip(np.searchsorted(times, ticks), 1, len(times) - 1)
    nearest = np.where(ticks - times[right - 1] <= times[right] - ticks, right - 1, right)
    return frames[nearest], rate


def _most_lines(frames: int, height: int, width: int) -> int | None:
    """Short side to scale a video of so many frames (0: unknown) to, or None to leave it."""
    count = min(frames or MOST_FRAMES, MOST_FRAMES)
    short, aspect = min(height, width), max(height, width) / min(height, width)
    if count * height * width * 3 <= MOST_BYTES and short <= LINES[0]:
        return None
    fitting = (lines for lines in LINES if lines < short and count * lines * lines * aspect * 3 <= MOST_BYTES)
    return next(fitting, None if short <= LINES[-1] else LINES[-1])
