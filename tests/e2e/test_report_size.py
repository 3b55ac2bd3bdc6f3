"""A report of 24 prompts of bigger videos stays light enough to send, and still shows every pair."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from vggrpo.evaluation import build_report
from vggrpo.io.manifest import ManifestRow, write_jsonl, write_manifest
from vggrpo.io.video import read_video, write_video

pytestmark = pytest.mark.e2e

PROMPTS, FRAMES, SIZE = 24, 49, (480, 832)


def film(seed: int) -> np.ndarray:
    """A camera over a detailed picture, with the noise of a sensor: what compresses badly."""
    rng = np.random.default_rng(seed)
    picture = sum(np.kron(rng.integers(0, 80, (640 // n, 1024 // n, 3)), np.ones((n, n, 1), int)) for n in (4, 16, 64))
    frames = [picture[2 * t : 2 * t + SIZE[0], 3 * t : 3 * t + SIZE[1]] for t in range(FRAMES)]
    return np.stack([np.clip(frame + rng.normal(0, 4, frame.shape), 0, 255).astype(np.uint8) for frame in frames])


def test_a_report_of_big_videos_stays_under_15_megabytes(tmp_path: Path) -> None:
    originals = [write_video(tmp_path / f"{seed}.mp4", film(seed), 16) for seed in range(2)]
    for index, arm in enumerate(("base", "tuned")):
        names = [f"{number}.mp4" for number in range(PROMPTS)]
        (tmp_path / arm).mkdir()
        for number, name in enumerate(names):
            shutil.copy(originals[(number + index) % 2], tmp_path / arm / name)
        rows = [ManifestRow(name, f"prompt {name}", 0, 16.0, arm) for name in names]
        write_manifest(tmp_path / arm / "manifest.jsonl", rows)
        value = {"value": 0.5 + 0.1 * index, "unit": "share", "valid": True, "reason": None}
        measured = [{"path": row.path, "prompt": row.prompt, "seed": 0, "arm": arm,
                     "metrics": {"epipolar_inliers": value}} for row in rows]  # fmt: skip
        write_jsonl(tmp_path / "eval" / arm / "metrics.jsonl", measured)
    assert sum(file.stat().st_size for file in originals) * PROMPTS > 50_000_000
    page = build_report(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 15_000_000
    assert "shown smaller than they are" in text and "without their videos" not in text.split("report-data")[-1]
    island = re.search(r'<script[^>]*id="report-videos"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert island is not None
    videos = json.loads(island[1])
    assert len(videos) == 2 * PROMPTS
    (tmp_path / "one.mp4").write_bytes(base64.b64decode(next(iter(videos.values()))))
    frames, _ = read_video(tmp_path / "one.mp4")
    assert len(frames) == FRAMES and min(frames.shape[1:3]) >= 160
