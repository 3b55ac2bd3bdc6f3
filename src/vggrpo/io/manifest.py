"""Manifests and other JSON-lines files: one JSON object a line.

A manifest says what each video is, so that no tool has to guess from file names:
`{path, prompt, seed, fps, arm, tags}`, with `path` relative to the manifest's own directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write


@dataclass(frozen=True)
class ManifestRow:
    """One video of a manifest.

    Attributes:
        path: video file, relative to the manifest (absolute paths are accepted).
        prompt: the text it was made from.
        seed: the seed of its initial noise; pairs of arms share it.
        fps: frames per second, > 0.
        arm: which model made it, such as "base" or "tuned".
        tags: free labels, such as "static" or "dynamic".
    """

    path: str
    prompt: str
    seed: int
    fps: float
    arm: str
    tags: tuple[str, ...] = field(default=())


_FIELDS: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "prompt": (str,),
    "seed": (int,),
    "fps": (int, float),
    "arm": (str,),
}


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; empty lines are skipped.

    Raises:
        UserError: when the file is missing, or a line is not a JSON object (the line number is named).
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file} does not exist or is not a file; expected JSON lines, one object a line")
    rows = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read as UTF-8 text ({error}); expected JSON lines, one object a line"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise UserError(f"{file}:{number} is not JSON ({reason}); expected one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number} is a JSON {type(row).__name__}, expected an object")
        rows.append(row)
    return rows


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines, atomically. NaN and infinity are refused, because they are not JSON."""
    lines = [json.dumps(dict(row), ensure_ascii=False, allow_nan=False) for row in rows]
    return atomic_write(path, "".join(line + "\n" for line in lines))


def read_manifest(path: Path | str) -> list[ManifestRow]:
    """Checked rows of a manifest.

    Raises:
        UserError: when the file is missing or empty, or a row lacks a field or has one of the wrong type.
    """
    rows = [_parse_row(row, f"{path} row {number}") for number, row in enumerate(read_jsonl(path), start=1)]
    if not rows:
        raise UserError(f"manifest {path} has no rows; each line needs {', '.join(_FIELDS)}")
    return rows


def _parse_row(row: Mapping[str, Any], where: str) -> ManifestRow:
    for name, types in _FIELDS.items():
        if name not in row:
            raise UserError(f"{where} lacks the field {name!r}; each row needs {', '.join(_FIELDS)}")
        # bool is an int in Python, but `"seed": true` is a mistake.
        if not isinstance(row[name], types) or isinstance(row[name], bool):
            expected = " or ".join(kind.__name__ for kind in types)
            raise UserError(f"{where}: {name} is {row[name]!r}, expected {expected}")
        if isinstance(row[name], str) and any("\ud800" <= letter <= "\udfff" for letter in row[name]):
            raise UserError(f"{where}: {name} is {row[name]!r}, which is half a letter and no Unicode text")
    if not 0 < row["fps"] < 1e6:
        raise UserError(f"{where}: fps is {row['fps']!s:.20}, expected a positive number below 1000000")
    tags = row.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise UserError(f"{where}: tags is {tags!r}, expected a list of strings")
    return ManifestRow(row["path"], row["prompt"], row["seed"], float(row["fps"]), row["arm"], tuple(tags))


def write_manifest(path: Path | str, rows: Iterable[ManifestRow]) -> Path:
    """Write a manifest atomically."""
    return write_jsonl(path, ({**asdict(row), "tags": list(row.tags)} for row in rows))
