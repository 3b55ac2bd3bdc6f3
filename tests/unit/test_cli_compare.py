"""`vggrpo compare` and `evaluate` as a user meets them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vggrpo.cli import main
from vggrpo.commands.compare import _run_directory
from vggrpo.evaluation import EvaluationModels
from vggrpo.io.manifest import write_jsonl


def metric_rows(arm: str, gain: float) -> list[dict]:
    return [
        {
            "path": f"{prompt}_{seed}.mp4",
            "prompt": f"prompt {prompt}",
            "seed": seed,
            "arm": arm,
            "metrics": {
                "epipolar_inliers": {
                    "value": 0.5 + 0.01 * prompt + gain,
                    "unit": "share",
                    "valid": True,
                    "reason": None,
                }
            },
        }
        for prompt in range(6)
        for seed in range(2)
    ]


def test_compare_prints_a_table_and_writes_json(tmp_path, capsys):
    for arm, gain in (("base", 0.0), ("tuned", 0.1)):
        write_jsonl(tmp_path / arm / "metrics.jsonl", metric_rows(arm, gain))
    output = tmp_path / "out"
    arguments = ["compare", str(tmp_path / "base"), str(tmp_path / "tuned" / "metrics.jsonl"), "--output", str(output)]
    assert main(arguments) == 0
    assert "epipolar_inliers" in capsys.readouterr().out
    numbers = json.loads((output / "comparison.json").read_text())
    assert numbers["metrics"]["epipolar_inliers"]["difference"]["mean"] == pytest.approx(0.1)
    assert "epipolar_inliers" in (output / "comparison.md").read_text()


def test_compare_tells_tags_failures_and_missing_partners_apart(tmp_path, capsys):
    base, tuned = metric_rows("base", 0.0), metric_rows("tuned", 0.1)
    for row in (*base, *tuned):
        row["tags"] = ["static" if int(row["prompt"][-1]) % 2 else "dynamic"]
    failed = {"value": None, "unit": "share", "valid": False, "reason": "video x cannot be | decoded"}
    tuned[0]["metrics"]["epipolar_inliers"] = failed
    orphan = tuned.pop()
    write_jsonl(tmp_path / "a" / "metrics.jsonl", base)
    write_jsonl(tmp_path / "b" / "metrics.jsonl", tuned)
    output = tmp_path / "out"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(output)]) == 0
    shown, text = capsys.readouterr().out, (output / "comparison.md").read_text()
    for words in ("static", "dynamic", "0 / 1", "cannot be | decoded", f"seed 1 of {orphan['prompt']!r}", "unknown"):
        assert words in shown and words in text, words
    numbers = json.loads((output / "comparison.json").read_text())
    metric = numbers["metrics"]["epipolar_inliers"]
    assert metric["reasons"] == {failed["reason"]: [0, 1]} and metric["pairs"] == 10
    assert numbers["missing_tuned"] == [[orphan["prompt"], 1]]
    assert metric["by_tag"]["static"]["n"] == metric["by_tag"]["dynamic"]["n"] == 3


def with_features(folder, rows: list[dict], shift: float, made_by: str) -> None:
    """What `evaluate` leaves of an arm whose clips are of the embedded world."""
    features = shift + np.random.default_rng(0).normal(size=(len(rows), 16))
    details = [
        {key: row[key] for key in ("path", "prompt", "seed", "arm")}
        | {
            "sources": {"adherence": made_by},
            "raw": {"adherence": {"features": f.tolist(), "shape": [17.0, 64.0, 64.0]}},
        }
        for row, f in zip(rows, features, strict=True)
    ]
    write_jsonl(folder / "metrics.jsonl", rows)
    write_jsonl(folder / "details.jsonl", details)


def test_compare_takes_the_kernel_distance_of_kept_features(tmp_path, capsys, monkeypatch):
    asked = []

    def reference(count, models, *, num_frames, size):
        asked.append((num_frames, size))
        return np.random.default_rng(1).normal(size=(count, 16))

    monkeypatch.setattr("vggrpo.evaluation.arms.reference_features", reference)
    made_by = f"attributes: {EvaluationModels().identity('attributes')}"
    with_features(tmp_path / "base", metric_rows("base", 0.0), 0.0, made_by)
    with_features(tmp_path / "tuned", metric_rows("tuned", 0.1), 1.0, made_by)
    output = tmp_path / "out"
    arguments = ["compare", str(tmp_path / "base"), str(tmp_path / "tuned"), "--output", str(output)]
    assert main(arguments) == 0
    shown, kernel = capsys.readouterr().out, json.loads((output / "comparison.json").read_text())["kernel"]
    assert "kernel_distance (MMD^2" in shown and "base against itself" in shown and asked == [(17, (64, 64))]
    assert kernel["difference"]["mean"] > kernel["against_base_itself"]["margin"] > 0
    assert not kernel["against_base_itself"]["holds"] and kernel["difference"]["n"] == 6
    with_features(tmp_path / "tuned", metric_rows("tuned", 0.1), 1.0, "attributes: another")
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert "no kernel distance" in told.err and "--attributes" in told.err and "kernel_distance" not in told.out


def test_compare_without_pairs_is_one_line(tmp_path, capsys):
    write_jsonl(tmp_path / "a" / "metrics.jsonl", metric_rows("base", 0.0)[:1])
    write_jsonl(tmp_path / "b" / "metrics.jsonl", metric_rows("tuned", 0.0)[-1:])
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "absent")]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": None}, "metrics is None"),
        ({"metrics": {"sharpness": 1.0}}, "sharpness is 1.0"),
        ({"metrics": {"sharpness": {"valid": True, "value": "x"}}}, "sharpness is {"),
        ({"seed": "1"}, "seed is '1'"),
        ({"tags": 5}, "tags is 5"),
        ({"metrics": {"sharpness": {"valid": True, "value": 1.0}}}, "share no metric"),
    ],
)
def test_compare_refuses_rows_that_evaluate_never_wrote(tmp_path, capsys, change, message):
    rows = metric_rows("base", 0.0)
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", [row | change for row in rows[:1]])
    assert main(["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message in error and "vggrpo evaluate" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("detail", "message"),
    [
        ({"fingerprint": "0@8 0.0.9", "sources": {}}, "measured by vggrpo 0.1.0, tuned by 0.0.9"),
        ({"fingerprint": "0@8 0.1.0", "sources": {"epipolar_inliers": "judge: b 2"}}, "judge: a 1 in base"),
    ],
)
def test_compare_refuses_numbers_of_two_judges_or_versions(tmp_path, capsys, detail, message):
    same = {"fingerprint": "1@8 0.1.0", "sources": {"epipolar_inliers": "judge: a 1"}}
    for arm, found in (("base", same), ("tuned", detail)):
        write_jsonl(tmp_path / arm / "metrics.jsonl", metric_rows(arm, 0.0))
        write_jsonl(tmp_path / arm / "details.jsonl", [found])
    assert main(["compare", str(tmp_path / "base"), str(tmp_path / "tuned")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_report_is_made_only_beside_the_videos(tmp_path):
    for arm in ("base", "tuned"):
        (tmp_path / "eval" / arm).mkdir(parents=True)
    assert _run_directory(tmp_path / "eval" / "base", tmp_path / "eval" / "tuned") is None
    for arm in ("base", "tuned"):
        write_jsonl(tmp_path / arm / "manifest.jsonl", [])
    assert _run_directory(tmp_path / "eval" / "base", tmp_path / "eval" / "tuned" / "metrics.jsonl") == tmp_path
    assert _run_directory(tmp_path / "eval" / "tuned", tmp_path / "eval" / "base") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["absent.jsonl"], "absent.jsonl"), (["absent.jsonl", "--metrics", "beauty"], "beauty")],
)
def test_evaluate_names_what_is_wrong(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments, "--metrics", "motion_flow", "--output", "out", *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
