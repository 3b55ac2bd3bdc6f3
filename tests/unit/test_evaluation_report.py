"""From a manifest to a report: rows with reasons, resume, pairing, and a page that opens without an error."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vggrpo.errors import UserError
from vggrpo.evaluation import build_report, compare, compare_kernel_distance, evaluate_manifest, summarise
from vggrpo.evaluation.report import FIXED_PART, embed_videos
from vggrpo.evaluation.scenes import STATIC, scene_of, write_scenes
from vggrpo.geometry import GeometryPrediction
from vggrpo.io.manifest import ManifestRow, read_jsonl, write_manifest
from vggrpo.io.video import read_video, write_video

EVIL = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'> ünï 漢字 %%DATA%%"
NAMES = ["motion_flow", "sharpness"]


def room_scene(by: str) -> dict:
    """Three views of a wavy wall; a corner of it moves."""
    depth = 2 + 0.1 * torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    cam2world = torch.eye(4).repeat(1, 3, 1, 1)
    cam2world[0, :, 0, 3] = torch.arange(3) * 0.1
    intrinsics = torch.tensor([[12.0, 0, 8], [0, 12, 6], [0, 0, 1]]).expand(1, 3, 3, 3)
    moving = torch.zeros(1, 3, 12, 16, dtype=torch.bool)
    moving[..., :4, :4] = True
    prediction = GeometryPrediction.from_depth(cam2world, intrinsics, depth, dynamic_mask=moving)
    return scene_of(prediction, np.full((3, 24, 32, 3), 200, np.uint8), by=by)


def evaluated_arms(tmp_path: Path) -> Path:
    """A run of two arms with scenes and metrics; one of its videos is broken."""
    rng = np.random.default_rng(0)
    for arm in ("base", "tuned"):
        rows = []
        for number, prompt in enumerate((EVIL, "a red ball", "a blue box")):
            video = rng.integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
            write_video(tmp_path / arm / f"clip {number} 'ü'.mp4", video, 8)
            rows.append(ManifestRow(f"clip {number} 'ü'.mp4", prompt, 0, 8.0, arm, ("static",)))
        write_manifest(tmp_path / arm / "manifest.jsonl", rows)
        write_scenes(
            tmp_path / "scenes" / f"{arm}.jsonl", [(EVIL, 0, room_scene(arm)), ("a red ball", 0, room_scene(arm))]
        )
    (tmp_path / "tuned" / "clip 2 'ü'.mp4").write_bytes(b"broken")
    for arm in ("base", "tuned"):
        evaluate_manifest(tmp_path / arm / "manifest.jsonl", tmp_path / "eval" / arm, NAMES)
    return tmp_path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return evaluated_arms(tmp_path)


def test_every_video_has_a_row_and_a_second_run_only_adds_what_is_new(run_dir: Path) -> None:
    manifest, output = run_dir / "tuned" / "manifest.jsonl", run_dir / "eval" / "tuned"
    rows = read_jsonl(output / "metrics.jsonl")
    assert set(rows[0]["metrics"]["sharpness"]) == {"value", "unit", "valid", "reason"}
    broken = rows[2]["metrics"]["sharpness"]
    assert not broken["valid"] and broken["value"] is None and str(run_dir) not in broken["reason"]
    seen: list[tuple[int, int]] = []
    evaluate_manifest(manifest, output, NAMES, progress=lambda *done: seen.append(done))
    assert seen == []
    (output / "metrics.jsonl").write_text(json.dumps(rows[0]) + '\n{"path": "cut o')
    evaluate_manifest(manifest, output, NAMES, progress=lambda *done: seen.append(done))
    assert seen == [(2, 3), (3, 3)]
    assert read_jsonl(output / "metrics.jsonl") == rows


def test_two_rows_of_one_prompt_and_seed_are_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.jsonl", [ManifestRow(name, "p", 0, 8.0, "base") for name in ("a.mp4", "b.mp4")])
    with pytest.raises(UserError, match="different seeds"):
        evaluate_manifest(tmp_path / "m.jsonl", tmp_path / "out", NAMES)


def fake_row(prompt: str, seed: int, inliers: float | None, motion: float) -> dict:
    values = {"epipolar_inliers": inliers, "motion_flow": motion, "motion_reward": 0.5}
    entries = {k: {"value": v, "unit": "1", "valid": v is not None, "reason": None} for k, v in values.items()}
    return {"path": "x", "prompt": prompt, "seed": seed, "arm": "a", "metrics": entries}


def test_compare_counts_failures_and_missing_partners() -> None:
    base = [fake_row(f"p{i}", s, 0.5 + 0.01 * i, 1.0) for i in range(6) for s in range(2)]
    tuned = [fake_row(f"p{i}", s, 0.6 + 0.01 * i, 1.0 if i else 0.1) for i in range(6) for s in range(2)][:-1]
    tuned[2]["metrics"]["epipolar_inliers"] = {"value": None, "unit": "1", "valid": False, "reason": "broken"}
    found = compare(base, tuned, resamples=200)
    metric = found.metrics["epipolar_inliers"]
    assert (metric.failures_base, metric.failures_tuned, metric.pairs) == (0, 1, 10)
    assert found.missing_tuned == [("p5", 1)] and found.missing_base == []
    assert metric.difference.mean == pytest.approx(0.1) and metric.improved
    assert metric.motion_matched is not None and metric.motion_matched.n == 5  # the frozen prompt is left out
    assert "epipolar_inliers" in found.to_markdown() and json.loads(found.to_json())
    entry = summarise(base, tuned, resamples=200)["motion_reward"]
    assert entry["independence"] == "reward" and entry["independent"] is False
    with pytest.raises(UserError, match="share no"):
        compare(base, [fake_row("other", 0, 0.5, 1.0)])


def test_kernel_distance_sees_a_shift_and_no_difference_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    reference, base = rng.normal(size=(60, 8)), rng.normal(size=(40, 8))
    prompts = [f"p{i // 2}" for i in range(40)]
    same = compare_kernel_distance(base, base + 1e-3, reference, prompts, resamples=500)
    moved = compare_kernel_distance(base, base + 1.0, reference, prompts, resamples=500)
    assert same.against_base_itself.holds and not moved.against_base_itself.holds
    assert moved.difference.low > 0


def test_scene_keeps_places_colours_and_what_moves() -> None:
    scene = room_scene("me")
    packed = scene["points"]
    xyz, rgb, view = (
        np.frombuffer(base64.b64decode(packed[k]), t)
        for k, t in zip(("xyz", "rgb", "view"), ("<i2", "u1", "<u2"), strict=True)
    )
    points = np.array(packed["centre"]) + packed["scale"] * xyz.reshape(-1, 3)
    assert packed["n"] == len(points) == len(view) > 100 and set(rgb) == {200}
    assert np.abs(points[:, 2] - 2.05).max() < 0.06  # the wall
    assert set(view) <= {0, 1, 2, STATIC} and 0 < (view != STATIC).mean() < 0.3
    assert np.array(scene["cameras"])[:, 3].tolist() == [0.0, 0.1, 0.2] and scene["fov"] == [0.6667, 0.5]
    assert len(json.dumps(scene)) < 12_000


def test_report_is_one_file_and_needs_an_evaluation(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    page = build_report(run_dir).read_text(encoding="utf-8")
    assert "<script>window.hacked" not in page and "src=x onerror" not in page.split("report-data")[0]
    assert "http-equiv" in page and len(page) < 15_000_000
    tight = build_report(run_dir, page_budget=FIXED_PART + 20_000).read_text(encoding="utf-8")
    assert len(tight.encode()) < FIXED_PART + 40_000 and "pairs are listed without their videos" in tight
    (run_dir / "scenes" / "base.jsonl").write_text('{"prompt": "a", "seed": 0}')
    with pytest.raises(UserError, match="not a scene"):
        build_report(run_dir)
    with pytest.raises(UserError, match="vggrpo evaluate"):
        build_report(tmp_path_factory.mktemp("empty"))


def test_both_videos_of_a_pair_are_made_smaller_alike_until_they_fit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = write_video(tmp_path / "noise.mp4", rng.integers(0, 255, (9, 256, 320, 3), dtype=np.uint8), 8)
    plain = write_video(tmp_path / "plain.mp4", np.full((9, 256, 320, 3), 90, np.uint8), 8)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    whole, note = embed_videos([(noise, plain)], 10_000_000)
    assert note is None and whole == {path: path.read_bytes() for path in (noise, plain)}
    small, note = embed_videos([(noise, plain), (tmp_path / "broken.mp4",)], 120_000)
    assert note is not None and "without their videos" not in note
    assert set(small) == {noise, plain} and sum(map(len, small.values())) <= 120_000
    (tmp_path / "small.mp4").write_bytes(small[noise])
    frames, fps = read_video(tmp_path / "small.mp4")
    assert len(frames) == 9 and fps == 8 and 96 <= frames.shape[1] < 240
    assert frames.shape[2] / frames.shape[1] == pytest.approx(320 / 256, rel=0.02)
