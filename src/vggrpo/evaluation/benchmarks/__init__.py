"""Prompt sets with tags: the shipped ones, those of the embedded world, and files of other benchmarks.

A tag is a word in the manifest: `static` or `dynamic` (does a subject move?), `scene:NAME`, `camera:MOVE` (as
`vggrpo.io.camera_words` reads them), `dimension:NAME` (VBench). What is in which file, and how the shipped sets are
balanced: see the README beside it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from vggrpo.errors import UserError
from vggrpo.io.camera_words import camera_moves
from vggrpo.io.prompts import read_prompt_lines

SHIPPED = ("static", "dynamic")
WORLD = ("world-static", "world-dynamic")
WORLD_PROMPTS = 96  # what a claim needs
WORLD_SEED = 96_000  # of the draw from the world's held-out captions


@dataclass(frozen=True)
class BenchmarkPrompt:
    """One prompt and what is known about it."""

    text: str
    tags: tuple[str, ...] = ()


def load_prompt_sets(sources: Sequence[str], limit: int | None = None) -> list[BenchmarkPrompt]:
    """Prompts of several sets, one after the other; a text that comes twice is kept once, with all its tags.

    Args:
        sources: `static`, `dynamic`, `world-static`, `world-dynamic`, or files (see `load_prompt_set`).
        limit: at most this many of each set, evenly spread over it, so that a part stays balanced.

    Raises:
        UserError: see `load_prompt_set`.
    """
    merged: dict[str, tuple[str, ...]] = {}
    for source in sources:
        prompts = load_prompt_set(source)
        count = len(prompts) if limit is None else min(limit, len(prompts))
        for k in range(count):
            prompt = prompts[k * len(prompts) // count]
            merged[prompt.text] = tuple(dict.fromkeys([*merged.get(prompt.text, ()), *prompt.tags]))
    return [BenchmarkPrompt(text, tags) for text, tags in merged.items()]


def load_prompt_set(source: str) -> list[BenchmarkPrompt]:
    """One set.

    Args:
        source: a shipped name; a text file, one prompt a line (World-R1 and VBench lists, one's own), where a comment
            `# tags: static scene:home` holds for the lines after it and camera words become tags; or a JSON list of
            `{"prompt_en": ..., "dimension": [...]}` (VBench's full info).

    Raises:
        UserError: when there is no such set or file, or it holds no prompt.
    """
    if source in WORLD:
        return list(_world(source.removeprefix("world-")))
    if source in SHIPPED:
        return _from_lines(str(files(__name__) / f"{source}.txt"))
    if not Path(source).exists():
        raise UserError(f"no prompt set {source!r}; use {', '.join((*SHIPPED, *WORLD))}, or the path of a file")
    return _from_json(Path(source)) if source.endswith(".json") else _from_lines(source)


def _from_lines(path: str) -> list[BenchmarkPrompt]:
    prompts, heading = [], ()
    for line in read_prompt_lines(path):
        if line.startswith("#"):
            found = re.match(r"#\s*tags:(.*)", line)
            heading = tuple(found[1].split()) if found else heading
        else:
            prompts.append(_tagged(line, heading))
    return prompts


def _from_json(path: Path) -> list[BenchmarkPrompt]:
    try:
        rows: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) and r.get("prompt_en") for r in rows):
        raise UserError(f'{path} is not a list of {{"prompt_en": ..., "dimension": [...]}} as VBench writes it')
    return [_tagged(str(r["prompt_en"]), [f"dimension:{name}" for name in r.get("dimension") or ()]) for r in rows]


@functools.cache  # a second of drawing, asked for by every table of a reproduction
def _world(kind: str) -> tuple[BenchmarkPrompt, ...]:
    """Captions of the embedded world that its models never saw, half of the draw moves."""
    from vggrpo.world import caption_to_attributes, sample_prompts

    prompts = []
    for text in sample_prompts(4 * WORLD_PROMPTS, WORLD_SEED, split="heldout"):
        attributes = caption_to_attributes(text) or {"objects": []}
        moving = any(thing["motion"] for thing in attributes["objects"])
        if moving == (kind == "dynamic"):
            prompts.append(_tagged(text, (kind,)))
    return tuple(prompts[:WORLD_PROMPTS])


def _tagged(text: str, tags: Iterable[str]) -> BenchmarkPrompt:
    return BenchmarkPrompt(text, tuple(dict.fromkeys([*tags, *(f"camera:{move}" for move in camera_moves(text))])))
