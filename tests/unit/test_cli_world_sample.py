"""`vggrpo world sample`: files that other tools read, and nothing overwritten."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vggrpo.cli import main
from vggrpo.io.cameras import read_tum
from vggrpo.io.manifest import read_manifest
from vggrpo.io.video import read_video

SMALL = ["--frames", "5", "--size", "16x24"]


def test_clips_truth_and_manifest_agree(tmp_path, capsys):
    output = tmp_path / "clips"
    assert main(["world", "sample", "--output", str(output), "--count", "2", "--seed", "7", *SMALL]) == 0
    assert "2 clips" in capsys.readouterr().out
    rows = read_manifest(output / "manifest.jsonl")
    assert [row.seed for row in rows] == [7, 8] and all(row.arm == "rendered" for row in rows)
    for row in rows:
        frames, fps = read_video(output / row.path)
        truth = np.load(output / row.path.replace(".mp4", ".npz"))
        poses, times = read_tum(output / row.path.replace(".mp4", ".tum.txt"))
        assert frames.shape == (5, 16, 24, 3) and fps == pytest.approx(row.fps)
        assert truth["depth"].shape == truth["dynamic_mask"].shape == (5, 16, 24)
        assert truth["scene_flow"].shape == (5, 16, 24, 3) and (truth["depth"] > 0).all()
        assert np.allclose(poses, truth["cam2world"], atol=1e-5) and np.allclose(poses[0], np.eye(4), atol=1e-5)
        assert np.allclose(np.diff(times), 1 / row.fps)
        assert str(truth["caption"]) == row.prompt and json.loads(str(truth["attributes"]))["camera"]
        assert row.tags == (("dynamic",) if truth["dynamic_mask"].any() else ("static",))


def test_same_seed_same_clip_and_camera_is_forced(tmp_path):
    for name, count in (("a", "1"), ("b", "2")):
        arguments = ["--output", str(tmp_path / name), "--count", count, "--camera", "pan_left", *SMALL]
        assert main(["world", "sample", *arguments]) == 0
    first, again = (np.load(tmp_path / name / "clip_000000.npz") for name in ("a", "b"))
    assert np.array_equal(first["depth"], again["depth"])
    assert json.loads(str(first["attributes"]))["camera"] == ["pan_left"]


def test_existing_clips_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "manifest.jsonl").write_text("precious")
    assert main(["world", "sample", "--output", str(tmp_path), *SMALL]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "manifest.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--camera", "spin"], "camera move 'spin' is not known"), (["--output", "/proc/1/task"], "cannot write to")],
)
def test_user_errors(tmp_path, capsys, arguments, message):
    assert main(["world", "sample", "--output", str(tmp_path / "new"), *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
