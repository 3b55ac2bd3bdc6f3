"""The demo in short: two prompts, one update, then a second call that finds everything done."""

from __future__ import annotations

import json

import pytest

from vggrpo.demo import run_demo
from vggrpo.errors import UserError


def test_demo_in_short(tmp_path):
    report = run_demo(tmp_path / "demo", updates=1, prompts=2)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["prompts"] == 2 and len(summary["seeds"]) == 2
    for name in (
        "motion_reward",
        "geometry_reward",
        "epipolar_inliers",
        "judge_reprojection",
        "adherence",
        "kernel_distance",
    ):
        entry = summary["metrics"][name]
        assert {"base", "tuned", "diff", "ci_low", "ci_high", "higher_is_better", "independent"} <= set(entry)
    assert report.read_text().startswith("<!")
    lora = tmp_path / "demo" / "train" / "lora" / "pytorch_lora_weights.safetensors"
    before, videos = lora.stat().st_mtime_ns, sorted((tmp_path / "demo").rglob("*.mp4"))
    assert len(videos) == 8
    made = [v.stat().st_mtime_ns for v in videos]
    run_demo(tmp_path / "demo", updates=1, prompts=2)
    assert [v.stat().st_mtime_ns for v in videos] == made and lora.stat().st_mtime_ns >= before
    with pytest.raises(UserError, match="--fresh"):
        run_demo(tmp_path / "demo", updates=2, prompts=2)


def test_demo_refuses_a_foreign_directory(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run_demo(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
