"""`vggrpo reproduce`: a table of the smallest size from outside, and that a second call does nothing again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

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
    assert result["arms"]["best-of-4"]["sampling"]["network_passes_per_video"] == 12
    owned = result["owners"]["vggrpo-guided-100"]
    assert owned["owner"] == "vggrpo" and owned["metrics"]["motion_reward"]["n"] == 2
    assert len(owned["metrics"]["kernel_distance"]["by_training_seed"]) == 1
    assert result["settings"]["quick"] and result["machine"]["torch"]
    assert "quick run" in (tmp_path / "guidance.md").read_text() and (tmp_path / "guidance.png").is_file()
    videos = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    assert main(arguments) == 0
    assert videos == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}


def killed_when(arguments, pattern, folder, errors):
    """Run the command in a process of its own and kill it as soon as a file of that pattern is there."""
    with errors.open("w") as handle:
        process = subprocess.Popen([sys.executable, "-m", "vggrpo.cli", *arguments], stdout=handle, stderr=handle)
        try:
            while process.poll() is None and not list(folder.glob(pattern)):
                time.sleep(0.05)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL, errors.read_text()


def test_a_row_with_an_lgm_of_its_own_survives_kills(tmp_path):
    output = tmp_path / "out"
    arguments = ["reproduce", "lgm", "--quick", "--arms", "lgm-rendered-only", "--sets", "world-static", "--output",
                 str(output), "--device", "cpu"]  # fmt: skip
    patterns = ("lgms/*/cache/clips-*.json", "lgms/*/checkpoints/step-*", "runs/*/log.jsonl")
    for number, pattern in enumerate(patterns):
        killed_when(arguments, pattern, output, tmp_path / f"{number}.err")
    assert main(arguments) == 0
    result = json.loads((output / "lgm.json").read_text())
    about = result["arms"]["lgm-rendered-only"]
    assert about["training_updates"] == 1 and about["lgm"]["card"]["updates"] == 1
    assert {"ratio", "spearman_judge"} <= about["lgm"]["audit"].keys()
    assert result["sets"]["world-static"]["lgm-rendered-only"]["metrics"]["motion_reward"]["n"] == 2
    assert "## LGMs of the arms" in (output / "lgm.md").read_text()


def test_the_study_of_stitching_at_its_smallest(tmp_path):
    arguments = ["reproduce", "stitch", "--quick", "--output", str(tmp_path), "--device", "cpu"]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "stitch.json").read_text())["lgms"]
    assert [row["layer"] for row in rows.values()] == [0, 1, 2, 0]
    assert [row["view_rate"] for row in rows.values()] == ["latent", "latent", "latent", "frame"]
    assert all(row["accuracy"]["ratio"]["abs_rel"] > 0 and row["training"]["updates"] == 1 for row in rows.values())
    assert "| lgm-layer-2 |" in (tmp_path / "stitch.md").read_text() and (tmp_path / "stitch.png").is_file()
    cards = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("card.json")}
    assert main(arguments) == 0
    assert cards == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("card.json")}


def test_the_study_of_hacking_at_its_smallest(tmp_path):
    arguments = ["reproduce", "hacking", "--quick", "--sets", "world-static", "--output", str(tmp_path),
                 "--device", "cpu"]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads((tmp_path / "hacking.json").read_text())
    for found in result["hacking"].values():
        assert found["marks"] == [1, 2] and len(found["log"]["kl"]) == 2
        assert len(found["sets"]["world-static"]["marks"]) == 2
        assert {"camera travel", "KL", "judge_reprojection"} <= found["watches"].keys()
    assert result["hacking"]["far-bare"]["log"]["kl"][1] > 0  # measured where it does not act
    assert "reward/camera_motion_hinge" not in result["hacking"]["far-bare"]["log"]
    assert "| watch | calls at |" in (tmp_path / "hacking.md").read_text() and (tmp_path / "hacking.png").is_file()
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("log.jsonl")}
    assert main(arguments) == 0
    assert logs == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("log.jsonl")}


def test_guidance_at_scale_zero_is_the_base_model(tmp_path):
    arguments = ["reproduce", "guidance", "--quick", "--arms", "guided-0", "guided-100", "--sets", "world-static",
                 "--output", str(tmp_path), "--device", "cpu"]  # fmt: skip
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "guidance.json").read_text())["sets"]["world-static"]
    assert rows["guided-0"]["equal_to_base"] and not rows["guided-100"]["equal_to_base"]
    assert rows["guided-0"]["metrics"]["motion_reward"]["diff"] == 0
    text = (tmp_path / "guidance.md").read_text()
    assert "bit for bit: guided-0." in text
    cost = json.loads((tmp_path / "guidance.json").read_text())["arms"]["guided-100"]["sampling"]
    assert cost["reward_gradients_per_video"] > 0 and cost["seconds_per_video"] > 0
