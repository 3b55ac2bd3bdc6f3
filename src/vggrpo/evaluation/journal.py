"""What an evaluation has measured so far: `metrics.jsonl` and `details.jsonl`, one line a video in each.

Lines are appended as videos finish and put into the manifest's order at the end. Only the position of each line is
kept in memory, so that it doesn't grow with what was measured. A video counts as measured when both its lines are
whole; details are written first, and a line that a crash cut off is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vggrpo.io.atomic import atomic_path

Key = tuple[str, str, int, str]  # path, prompt, seed, arm
FILES = ("metrics.jsonl", "details.jsonl")


def key_of(row: dict[str, Any]) -> Key:
    return (row["path"], row["prompt"], row["seed"], row["arm"])


class Journal:
    """The two files of one output directory.

    Args:
        directory: where they are, or will be.
        fresh: forget an earlier run.
    """

    def __init__(self, directory: Path, *, fresh: bool = False) -> None:
        self.metrics, self.details = (directory / name for name in FILES)
        if fresh:
            for file in (self.metrics, self.details):
                file.unlink(missing_ok=True)
        self._places: dict[Path, dict[Key, int]] = {file: dict(_lines(file)) for file in (self.metrics, self.details)}
        for file in (self.metrics, self.details):
            _end_last_line(file)

    def read(self, key: Key) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The metrics row and the details row of a video that was measured, or None."""
        if any(key not in places for places in self._places.values()):
            return None
        row, detail = (_row_at(file, places[key]) for file, places in self._places.items())
        return row, detail

    def append(self, row: dict[str, Any], detail: dict[str, Any]) -> None:
        """Add a video, or replace what was known of it."""
        for file, line in ((self.details, detail), (self.metrics, row)):
            with file.open("ab") as handle:
                self._places[file][key_of(line)] = handle.tell()
                handle.write(_encoded(line))

    def put_in_order(self, keys: Iterable[Key]) -> Path:
        """Rewrite both files with one line for each of `keys`, in that order, and return the metrics file."""
        keys = list(keys)
        for file, places in self._places.items():
            now: dict[Key, int] = {}
            with atomic_path(file) as temporary, temporary.open("wb") as target, file.open("rb") as source:
                for key in keys:
                    source.seek(places[key])
                    now[key] = target.tell()
                    target.write(source.readline())
            self._places[file] = now
        return self.metrics


def _encoded(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _row_at(file: Path, place: int) -> dict[str, Any]:
    with file.open("rb") as handle:
        handle.seek(place)
        row: dict[str, Any] = json.loads(handle.readline())
        return row


def _lines(file: Path) -> Iterator[tuple[Key, int]]:
    """Key and position of every whole row; of two with one key the later one wins."""
    if not file.is_file():
        return
    with file.open("rb") as handle:
        place = 0
        for line in handle:
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                row = None
            if _is_ours(row):
                yield key_of(row), place
            place += len(line)


def _is_ours(row: Any) -> bool:
    """Whether a line has the shape of those that are written here; what else is in the file is passed over."""
    kinds = {"path": str, "prompt": str, "seed": int, "arm": str}
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), kind) for name, kind in kinds.items())
        and isinstance(row.get("metrics", row.get("sources")), dict)
    )


def _end_last_line(file: Path) -> None:
    """A line that a crash cut off must not swallow the next one."""
    if file.is_file() and file.stat().st_size:
        with file.open("rb+") as handle:
            handle.seek(-1, 2)
            if handle.read(1) != b"\n":
                handle.write(b"\n")
