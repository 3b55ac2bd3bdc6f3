"""`evaluate_manifest` on footage that is not as it should be, interrupted, resumed, in parallel."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vggrpo.cli import main
from vggrpo.commands.evaluate import Progress, spoken
from vggrpo.errors import UserError
from vggrpo.evaluation import EvaluationModels, evaluate_manifest
from vggrpo.evaluation.footage import _evenly_spaced
from vggrpo.evaluation.journal import Journal
from vggrpo.io.manifest import ManifestRow, read_jsonl, read_manifest, write_manifest
from vggrpo.io.video import write_video

FAST = ["motion_flow", "ssim_change", "sharpness"]
RNG = np.random.default_rng(0)
PICTURE = np.kron(RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8), np.ones((4, 4, 1), np.uint8))


def moving(frames: int = 9, height: int = 64, width: int = 64) -> np.ndarray:
    picture = np.tile(PICTURE, (height // 64 + 2, width // 64 + 2, 1))
    return np.stack([picture[t : t + height, t : t + width] for t in range(frames)])


def write_raw(
    path: Path, frames: np.ndarray, times: list[int], codec: str = "libx264", pixels: str = "yuv420p"
) -> Path:
    """A file whose frames have the given time stamps in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        layout = "rgba" if frames.shape[-1] == 4 else "rgb24"
        for time, picture in zip(times, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format=layout)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def measured(manifest: Path, output: Path, **options) -> dict[str, dict]:
    rows = read_jsonl(evaluate_manifest(manifest, output, FAST, **options))
    return {Path(row["path"]).name: row["metrics"] for row in rows}


def test_a_folder_of_strange_files_gives_a_row_each(tmp_path):
    folder, output = tmp_path / "my videos", tmp_path / "out"
    folder.mkdir()
    whole = write_video(folder / "whole.mp4", moving(), 8)
    write_video(folder / 'a "quoted" <b>ünï 視.mp4', moving(), 8)
    (folder / "truncated.mp4").write_bytes(whole.read_bytes()[:-600])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video")
    write_video(folder / "one frame.mp4", moving(1), 8)
    os.symlink(folder / "nowhere.mp4", folder / "dangling.mp4")
    found = measured(folder, output)
    assert len(found) == 6  # a dangling link is no file
    for name in ("whole.mp4", 'a "quoted" <b>ünï 視.mp4'):
        assert all(entry["valid"] for entry in found[name].values()), found[name]
    for name, words in [
        ("truncated.mp4", "decoded"), ("empty.mp4", "decoded"), ("text.mp4", "decoded"),
    ]:  # fmt: skip
        reasons = {entry["reason"] for entry in found[name].values()}
        assert len(reasons) == 1 and words in reasons.pop()
        assert not any(entry["valid"] for entry in found[name].values())
    assert found["one frame.mp4"]["sharpness"]["valid"] and not found["one frame.mp4"]["motion_flow"]["valid"]
    manifest = read_manifest(output / "manifest.jsonl")
    assert [row.fps for row in manifest if row.prompt == "whole"] == [8.0]
    assert all((output / row.path).is_file() and row.arm == "my videos" for row in manifest)
    assert measured(output / "manifest.jsonl", output) == found  # the manifest stands for the folder


def test_a_variable_frame_rate_is_resampled_and_the_row_says_so(tmp_path):
    """A clip that drops frames now and then measures as it would have with the frames that are there at its rate."""
    whole = moving(33)
    kept = [t for t in range(33) if t % 8 not in (3, 4)]
    write_raw(tmp_path / "even.mp4", whole, [40 * t for t in range(33)])
    write_raw(tmp_path / "uneven.mp4", whole[kept], [40 * t for t in kept])
    write_raw(tmp_path / "long gap.mp4", moving(6), [0, 40, 80, 600_000, 600_040, 600_080])
    # The wrong rate in the manifest shows whose rate counts.
    rows = [ManifestRow(f"{name}.mp4", name, 0, fps, "x") for name, fps in
            (("even", 25), ("uneven", 3), ("long gap", 25))]  # fmt: skip
    found = read_jsonl(evaluate_manifest(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "out", FAST))
    even, uneven, gap = found
    assert "note" not in even
    assert (
        uneven["note"]
        == "variable frame rate (steps of 40 to 120 ms): resampled to 25 frames a second by its time stamps"
    )
    for name in ("motion_flow", "ssim_change"):
        assert uneven["metrics"][name]["value"] == pytest.approx(even["metrics"][name]["value"], rel=0.15), name
    assert all(entry["valid"] for entry in gap["metrics"].values()) and "1.998 frames" in gap["note"]


@pytest.mark.parametrize(
    ("times", "kept", "rate"),
    [
        ([0, 1, 2, 4, 5], [0, 1, 2, 2, 3, 4], 1.0),
        ([0.0, 0.1, 0.25, 0.3, 0.4], [0, 1, 2, 3, 4], 10.0),
        ([7, 8, 9, 10, 14], [0, 1, 2, 3, 3, 3, 4, 4], 1.0),
    ],
)
def test_the_nearest_frame_stands_for_each_tick(times, kept, rate):
    frames = np.arange(len(times), dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 1, 3), np.uint8)
    found, found_rate = _evenly_spaced(frames, np.array(times, dtype=float))
    assert found[:, 0, 0, 0].tolist() == kept and found_rate == pytest.approx(rate)


def test_alpha_is_dropped_and_no_frames_is_a_reason(tmp_path):
    alpha = np.concatenate([moving(9), np.full((9, 64, 64, 1), 128, np.uint8)], -1)
    write_raw(tmp_path / "alpha.mov", alpha, list(range(0, 360, 40)), "qtrle", "argb")
    with av.open(str(tmp_path / "none.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
    rows = [ManifestRow(name, name, 0, 8, "x") for name in ("alpha.mov", "none.mp4", "absent.mp4")]
    found = measured(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert all(entry["valid"] for entry in found["alpha.mov"].values()), found["alpha.mov"]
    for name in ("none.mp4", "absent.mp4"):
        assert all(not entry["valid"] and entry["reason"] for entry in found[name].values())


def test_same_file_twice_and_an_empty_manifest_are_one_line_errors(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", moving(), 8)
    twice = [ManifestRow("a.mp4", "p", 0, 8, "x"), ManifestRow("a.mp4", "p", 0, 8, "x")]
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    for manifest in (write_manifest(tmp_path / "twice.jsonl", twice), tmp_path / "empty.jsonl", tmp_path / "folder"):
        assert main(["evaluate", str(manifest), "--output", str(tmp_path / "out"), "--metrics", "sharpness"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    other_seed = [twice[0], ManifestRow("a.mp4", "p", 1, 8, "x")]  # one file under two seeds is two rows
    rows = read_jsonl(evaluate_manifest(write_manifest(tmp_path / "m.jsonl", other_seed), tmp_path / "out", FAST))
    assert [row["seed"] for row in rows] == [0, 1] and rows[0]["metrics"] == rows[1]["metrics"]


def test_a_broken_judge_or_device_ends_the_run_before_it_starts(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", moving(), 8)
    arguments = ["evaluate", str(tmp_path), "--output", str(tmp_path / "out"), "--metrics", "judge_reprojection"]
    (tmp_path / "empty").mkdir()
    for jobs in ("1", "2"):
        assert main([*arguments, "--jobs", jobs, "--judge", str(tmp_path / "empty")]) == 2
        error = capsys.readouterr().err
        assert "no geometry model in" in error and error.count("\n") == 1
    assert main([*arguments, "--judge", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("vggrpo: error: --judge ")
    assert main([*arguments, "--device", "gpu"]) == 2
    assert "'gpu' is no device" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_name_that_is_too_long_is_a_row_with_a_reason(tmp_path):
    long = "a" * 5000 + ".mp4"
    manifest = write_manifest(tmp_path / "m.jsonl", [ManifestRow(long, "p", 0, 8, "x")])
    assert "does not exist" in measured(manifest, tmp_path / "out")[long]["sharpness"]["reason"]


def test_lines_of_others_in_the_output_are_passed_over(tmp_path):
    write_video(tmp_path / "a.mp4", moving(), 8)
    manifest = write_manifest(tmp_path / "m.jsonl", [ManifestRow("a.mp4", "p", 0, 8, "x")])
    (tmp_path / "out").mkdir()
    mine = {"path": "a.mp4", "prompt": "p", "seed": 0, "arm": "x"}
    lines = [mine, mine | {"path": ["a"]}, [], None]
    for name in ("metrics.jsonl", "details.jsonl"):
        (tmp_path / "out" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured(manifest, tmp_path / "out")["a.mp4"]["sharpness"]["valid"]


def test_only_what_changed_is_measured_again(tmp_path, monkeypatch):
    import vggrpo.evaluation.evaluate as module

    write_video(tmp_path / "a.mp4", moving(), 8)
    manifest = write_manifest(tmp_path / "m.jsonl", [ManifestRow("a.mp4", "p", 0, 8, "x")])
    calls: list[tuple[str, ...]] = []
    measure = module._measure
    monkeypatch.setattr(module, "_measure", lambda job, models: calls.append(job.metrics) or measure(job, models))
    evaluate_manifest(manifest, tmp_path / "out", "sharpness")
    evaluate_manifest(manifest, tmp_path / "out", "sharpness,motion_flow")
    evaluate_manifest(manifest, tmp_path / "out", "sharpness")
    assert calls == [("sharpness",), ("motion_flow",)]
    row = read_jsonl(tmp_path / "out" / "metrics.jsonl")[0]
    assert set(row) == {"path", "prompt", "seed", "arm", "metrics"} and set(row["metrics"]) == {
        "sharpness",
        "motion_flow",
    }
    assert set(row["metrics"]["sharpness"]) == {"value", "unit", "valid", "reason"}
    evaluate_manifest(manifest, tmp_path / "out", "judge_reprojection")
    evaluate_manifest(manifest, tmp_path / "out", "judge_reprojection")
    other = EvaluationModels(judge=_copy_of_judge(tmp_path))  # the same weights elsewhere are the same judge
    evaluate_manifest(manifest, tmp_path / "out", "judge_reprojection", models=other)
    monkeypatch.setattr(EvaluationModels, "identity", lambda self, name: "another")
    monkeypatch.setattr(EvaluationModels, "missing", lambda self, names: {})
    evaluate_manifest(manifest, tmp_path / "out", "judge_reprojection")
    assert calls[2:] == [("judge_reprojection",)] * 2


def _copy_of_judge(folder: Path) -> Path:
    import shutil

    from vggrpo import assets

    return Path(shutil.copytree(assets.path("judge"), folder / "judge"))


def test_what_only_all_asks_for_may_be_missing(tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "a.mp4", moving(), 8)
    manifest = write_manifest(tmp_path / "m.jsonl", [ManifestRow("a.mp4", "p", 0, 8, "x")])
    reasons = {"sfm": "pycolmap is not installed: pip install 'vggrpo[sfm]'"}
    monkeypatch.setattr(EvaluationModels, "_find_reason", lambda self, name: reasons.get(name))
    with pytest.raises(UserError, match="vggrpo\\[sfm\\]"):
        evaluate_manifest(manifest, tmp_path / "out", "sfm_registered,sharpness")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    monkeypatch.setattr("vggrpo.evaluation.metrics._ALL", select_few())
    evaluate_manifest(manifest, tmp_path / "out", "all")
    metrics = read_jsonl(tmp_path / "out" / "metrics.jsonl")[0]["metrics"]
    assert metrics["sfm_registered"]["reason"] == reasons["sfm"] and metrics["sharpness"]["valid"]
    arguments = ["evaluate", str(manifest), "--output", str(tmp_path / "out"), "--metrics", "all", "--jobs", "1"]
    assert main([*arguments, "--offline"]) == 0
    assert "missing: sfm: pycolmap is not installed" in capsys.readouterr().err


def select_few():
    from vggrpo.evaluation import METRICS

    return tuple(METRICS[name] for name in ("sharpness", "sfm_registered"))


def test_a_line_cut_off_by_a_crash_is_measured_again(tmp_path):
    files = [write_video(tmp_path / f"{n}.mp4", moving(), 8) for n in "ab"]
    rows = [ManifestRow(file.name, file.stem, 0, 8, "x") for file in files]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    found = measured(manifest, tmp_path / "out")
    target = tmp_path / "out" / "metrics.jsonl"
    text = target.read_bytes()
    target.write_bytes(text[:-40])
    seen = []
    assert measured(manifest, tmp_path / "out", progress=lambda *counts: seen.append(counts)) == found
    assert seen == [(2, 2)] and target.read_bytes() == text
    kept = Journal(tmp_path / "out").read(("a.mp4", "a", 0, "x"))
    assert kept is not None and kept[0]["metrics"] == found["a.mp4"] and kept[1]["raw"]["sharpness"]["frames"]


def test_progress_says_how_long_it_will_take(capsys):
    progress = Progress()
    for done in range(5, 9):  # four were measured by an earlier run
        progress(done, 8)
    assert capsys.readouterr().err == "8 of 8 videos\n"
    assert [spoken(t) for t in (40.2, 200, 9000)] == ["40 s", "3 min", "2.5 h"]
    assert json.dumps(spoken(59.6)) == '"60 s"'
