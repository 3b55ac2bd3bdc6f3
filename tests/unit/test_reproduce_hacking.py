"""The study of reward hacking: when a watch calls, when a metric turns, marks that are one run, and its pages."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest

from vggrpo.config import load_config
from vggrpo.reproduce import Settings, hacking
from vggrpo.reproduce.curves import draw_hacking
from vggrpo.reproduce.hacking import crossing, first_to_see, lora_at, mark_updates, thresholds, turning_point, watches
from vggrpo.reproduce.recipes import FAR
from vggrpo.reproduce.settings import arm_config


@pytest.mark.parametrize(
    ("values", "limit", "below", "expected"),
    [
        ([1.0, 0.9, 0.7, 0.6, 0.5], 0.8, True, 4),  # means of two: .95, .8, .65
        ([1.0, 0.9, None, 0.6], 0.8, True, 4),
        ([1.0, 1.0, 1.0], 0.8, True, None),
        ([0.0, 0.1, 0.3], 0.15, False, 3),
        ([], 0.8, True, None),
        ([None, None], 0.8, True, None),
    ],
)
def test_a_watch_calls_when_its_mean_crosses(values, limit, below, expected):
    assert crossing(values, limit, 2, below=below) == expected


def rows(value, spread=0.01):
    """Ten prompts with one metric each around `value`."""
    measured = [{"value": value + spread * (i % 3), "unit": "", "valid": True, "reason": None} for i in range(10)]
    return [
        {"path": f"{i}.mp4", "prompt": f"prompt {i}", "seed": 0, "arm": "x", "metrics": {"epipolar_inliers": one}}
        for i, one in enumerate(measured)
    ]


def test_a_metric_turns_when_it_is_clearly_worse_than_at_its_best():
    states = [[rows(0.6)], [rows(0.8)], [rows(0.79)], [rows(0.3)]]
    found = turning_point("epipolar_inliers", rows(0.5), states, [10, 20, 30, 40])
    assert found == {"best": 20, "crossed": 30}  # the same spread everywhere: the interval of .01 is off zero
    rising = turning_point("epipolar_inliers", rows(0.5), [[rows(0.6)], [rows(0.7)]], [10, 20])
    assert rising == {"best": 20, "crossed": None}
    falling = turning_point("epipolar_inliers", rows(0.5), [[rows(0.4)], [rows(0.3)]], [10, 20])
    assert falling == {"best": 0, "crossed": 10}
    assert turning_point("adherence", rows(0.5), [[rows(0.4)]], [10]) == {"best": 0, "crossed": None}


def test_who_looks_often_has_to_see_more():
    noisy = [rows(0.5), rows(0.5)]
    for i, row in enumerate(noisy[1]):
        row["metrics"]["epipolar_inliers"]["value"] -= 0.02 if i % 5 else -0.01  # 8 of 10 prompts get worse
    called = [turning_point("epipolar_inliers", noisy[0], [[noisy[1]]], [10], looks)["crossed"] for looks in (1, 1000)]
    assert called == [10, None]


def mark(value):
    entry = {"base": 0.5, "tuned": value, "diff": value - 0.5, "ci_low": value - 0.6, "ci_high": value - 0.4,
             "higher_is_better": True, "n": 40}  # fmt: skip
    return {"metrics": {"epipolar_inliers": entry, "motion_reward": entry}, "motion_ratio": 0.9}


def study():
    log = {"camera_travel_ratio": [1.0, 0.9, 0.7, 0.5], "dynamic_share_ratio": [1.0, None, 1.0, 0.9],
           "subject_share_ratio": [1.0, 0.9, 0.9, 0.6], "kl": [0.0, 0.001, 0.002, 0.02]}  # fmt: skip
    turned = {name: {"best": 2, "crossed": None} for name in hacking.MEASURED}
    turned["epipolar_inliers"] = {"best": 2, "crossed": 4}
    found = {"about": "far", "marks": [2, 4], "log": log,
             "sets": {"world-static": {"marks": [mark(0.6), mark(0.4)], "turned": turned}}}  # fmt: skip
    limits = {"camera travel": 0.8, "share of moving pixels": 0.8, "share of subject pixels": 0.8, "KL": 0.005}
    found["watches"] = watches(found, limits, 1)
    found["log_at_marks"] = hacking.log_at(log, [2, 4], 2)
    found["first"] = first_to_see(found["watches"])
    found["kl_at_first"] = hacking.kl_at_first(found)
    return found, limits


def test_the_first_watch_is_named():
    found, limits = study()
    calls = {name: watch["crossed"] for name, watch in found["watches"].items()}
    assert calls["camera travel"] == 3 and calls["KL"] == 4 and calls["epipolar_inliers"] == 4
    assert calls["share of subject pixels"] == 4
    assert calls["share of moving pixels"] is None and found["first"] == ["camera travel"]
    assert calls[hacking.MOTION] is None
    found["sets"]["world-static"]["marks"][1]["motion_ratio"] = 0.7
    assert watches(found, limits, 1)[hacking.MOTION]["crossed"] == 4
    assert first_to_see({"a": {"crossed": None}}) == []
    assert found["kl_at_first"] == pytest.approx(0.011)
    assert found["log_at_marks"]["camera_travel_ratio"] == pytest.approx([0.95, 0.6])


def test_its_page_says_who_saw_it_first(tmp_path):
    found, limits = study()
    settings = {
        "quick": False,
        "config": "tiny",
        "seeds": 1,
        "prompts": 40,
        "videos": 1,
        "steps": 20,
        "guidance_scale": 1.0,
    }
    where = {"gpu": None, "platform": "Test", "processors": 2, "torch": "2", "vggrpo": "0"}
    text = hacking._markdown({"title": "T", "settings": settings, "machine": where, "hacking": {"far": found}})
    assert "First to call: **camera travel**, after 3 of 4 updates. KL at the first call of an independent" in text
    assert "| camera travel | 0.8 | 3 |" in text and "| adherence | worse than at its best | never |" in text
    assert "| 4 | 0.6 | 0.95 | 0.75 | 0.011 |" in text
    draw_hacking(tmp_path / "h.png", {"far": found, "far-bare": found}, limits)
    picture = cv2.imread(str(tmp_path / "h.png"))
    assert picture.shape[0] == 4 * 190 and (picture < 100).any()


def test_marks_are_one_run_whose_weights_are_kept(tmp_path, monkeypatch):
    calls = []

    def fake_train(config, progress):
        calls.append(config.updates)
        lora = Path(config.output) / "lora"
        lora.mkdir(parents=True, exist_ok=True)
        (lora / "weights").write_text(str(config.updates))
        return lora

    monkeypatch.setattr(hacking, "train", fake_train)
    settings = Settings(far=20, marks=4)
    marks = mark_updates(arm_config(FAR[0], settings, tmp_path, 0), settings)
    assert marks == [5, 10, 15, 20]
    assert mark_updates(load_config("tiny", ["updates=10"]), Settings())[-1] == 50
    kept = [lora_at(FAR[0], 0, updates, tmp_path, settings) for updates in marks]
    assert [(folder / "weights").read_text() for folder in kept] == ["5", "10", "15", "20"]
    assert lora_at(FAR[0], 0, 5, tmp_path, settings) == kept[0] and calls == marks


def test_thresholds_are_those_of_the_stop_rule():
    found = thresholds(load_config("tiny", ["stop={travel_below: 0.7, subjects_below: 0.6, kl_above: 0.3}"]))
    floor = hacking.DEFAULT_FLOOR
    assert found == {
        "camera travel": 0.7, "share of moving pixels": floor, "share of subject pixels": 0.6, "KL": 0.3
    }  # fmt: skip
