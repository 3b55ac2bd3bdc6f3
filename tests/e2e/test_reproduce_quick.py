"""`vggrpo reproduce`: a table of the smallest size from outside, and that a second call does nothing again."""

from __future__ import annotations

import json

import pytest

from vggrpo.cli import main

pytestmark = pytest.mark.e2e


def test_a_quick_table_resumes_and_states_what_it_is(tmp_path):
    arguments = ["reproduce", "guidance", "--quick", "--arms", "best-of-4", "vggrpo-guided-100",
                 "--sets", "world-dynamic", "--output", str(tmp_path), "--device", "cpu"]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads((tmp_path / "guidance.json").read_text())
    (rows,) = result["sets"].values()
    assert set(rows) == {"best-of-4", "vggrpo-guided-100"}
    assert all({"motion_reward", "judge_reprojection"} <= set(row["metrics"]) for row in rows.values())
    assert rows["best-of-4"]["metrics"]["motion_reward"]["n"] == 2
    assert result["arms"]["best-of-4"]["sampling"]["network_passes_per_video"] == 24
    assert result["settings"]["quick"] and result["machine"]["torch"]
    assert "quick run" in (tmp_path / "guidance.md").read_text() and (tmp_path / "guidance.png").is_file()
    videos = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    assert main(arguments) == 0
    assert videos == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
