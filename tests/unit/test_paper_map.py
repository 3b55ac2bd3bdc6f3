"""docs/paper_map.md points at lines that define what it says."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_pointer_is_a_definition():
    pointers = re.findall(r"(src/\S+\.py):(\d+)", (ROOT / "docs" / "paper_map.md").read_text())
    assert len(pointers) >= 10
    for path, line in pointers:
        text = (ROOT / path).read_text().splitlines()[int(line) - 1]
        assert re.match(r"(def|class) \w+", text), f"{path}:{line} is {text!r}"
