"""`evaluate_manifest` in several processes, with large files, and with many videos."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from vggrpo.evaluation import EvaluationModels, evaluate_manifest
from vggrpo.evaluation.footage import _most_lines
from vggrpo.evaluation.pool import Died, each
from vggrpo.io.manifest import ManifestRow, read_jsonl, write_manifest
from vggrpo.io.video import decode_video, write_video

pytestmark = pytest.mark.e2e

FAST = ["motion_flow", "ssim_change", "sharpness"]
PICTURE = np.kron(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8), np.ones((4, 4, 1), np.uint8))


def moving(frames: int = 9, height: int = 64, width: int = 64) -> np.ndarray:
    picture = np.tile(PICTURE, (height // 64 + 2, width // 64 + 2, 1))
    return np.stack([picture[t : t + height, t : t + width] for t in range(frames)])


def measured(manifest: Path, output: Path) -> dict[str, dict]:
    return {Path(row["path"]).name: row["metrics"] for row in read_jsonl(evaluate_manifest(manifest, output, FAST))}


def test_a_large_clip_is_scaled_while_it_is_decoded(tmp_path):
    file = write_video(tmp_path / "4k.mp4", moving(2, 2160, 3840), 8)
    found = measured(write_manifest(tmp_path / "m.jsonl", [ManifestRow("4k.mp4", "p", 0, 8, "x")]), tmp_path / "out")
    assert found["4k.mp4"]["motion_flow"]["valid"] and found["4k.mp4"]["sharpness"]["valid"]
    assert decode_video(file, most_lines=_most_lines).frames.shape == (2, 1080, 1920, 3)
    assert decode_video(file).frames.shape == (2, 2160, 3840, 3)
    for frames, height, width in [(80, 2160, 3840), (1200, 1080, 1920), (0, 720, 1280), (500, 1920, 1080)]:
        lines = _most_lines(frames, height, width)
        assert lines is not None and lines >= 480
        scale = lines / min(height, width)
        assert lines == 480 or (frames or 1200) * height * width * 3 * scale**2 <= 800_000_000
    assert _most_lines(81, 720, 1280) is None and _most_lines(1200, 64, 64) is None


def deadly(job: int, models: EvaluationModels) -> int:
    if job == 3:
        os._exit(9)
    return job * job


def test_a_process_that_dies_is_that_videos_failure_alone():
    results = dict(each(deadly, range(5), EvaluationModels(), workers=2))
    assert isinstance(results.pop(3), Died)
    assert results == {0: 0, 1: 1, 2: 4, 4: 16}


def test_ctrl_c_while_the_processes_start_is_one_line(tmp_path):
    write_video(tmp_path / "a.mp4", moving(), 8)
    manifest = write_manifest(tmp_path / "m.jsonl", [ManifestRow("a.mp4", "p", seed, 8, "x") for seed in range(2000)])
    command = [sys.executable, "-m", "vggrpo.cli", "evaluate", str(manifest), "--output", str(tmp_path / "out")]
    run = subprocess.Popen(
        [*command, "--metrics", "sharpness", "--jobs", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background of a shell ignores interrupts, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    parent = psutil.Process(run.pid)
    # One that tracks what they share, and the first of two.
    while run.poll() is None and len(parent.children()) < 2:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=120)
    assert run.returncode == 130 and error.strip().startswith("vggrpo: interrupted") and error.strip().count("\n") == 0


def test_parallel_rows_are_the_same_in_the_manifests_order(tmp_path):
    files = [write_video(tmp_path / f"{n}.mp4", moving(9 - n), 8) for n in range(3)]
    manifest = write_manifest(tmp_path / "m.jsonl", [ManifestRow(f.name, f.stem, 0, 8, "x") for f in files])
    one = evaluate_manifest(manifest, tmp_path / "one", FAST)
    two = evaluate_manifest(manifest, tmp_path / "two", FAST, workers=2)
    assert one.read_bytes() == two.read_bytes()


def test_memory_is_flat_in_the_number_of_videos(tmp_path):
    write_video(tmp_path / "a.mp4", moving(17, 480, 640), 8)  # 16 MB decoded
    process = psutil.Process()

    def growth(count: int) -> float:
        rows = [ManifestRow("a.mp4", f"p{n}", 0, 8, "x") for n in range(count)]
        manifest = write_manifest(tmp_path / f"{count}.jsonl", rows)
        evaluate_manifest(manifest, tmp_path / f"out{count}", "ssim_change")
        return process.memory_info().rss / 2**20

    growth(2)
    before = growth(3)
    assert growth(23) < before + 60  # MB; twenty clips kept would be 400
