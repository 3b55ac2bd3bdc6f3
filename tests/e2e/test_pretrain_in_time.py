"""Training the shipped models further within a time limit: benchmarks/pretrain_gpu.py in small, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vggrpo import assets
from vggrpo.lgm import LatentGeometryModel
from vggrpo.pretraining import data
from vggrpo.pretraining.loop import Schedule


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location(
        "pretrain_gpu", Path(__file__).parents[2] / "benchmarks" / "pretrain_gpu.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pretrain_gpu"]


def test_judge_and_lgm_in_short(script, tmp_path, monkeypatch):
    audited = []
    monkeypatch.setattr(script, "audit_reward", lambda lgm, *_, **options: audited.append((lgm, options["device"])))
    monkeypatch.setattr(data, "SHARD_SIZE", 256)  # put back afterwards
    small = ["--seconds", "20", "--device", "cpu", "--clips", "4", "--steps", "1", "--generated", "2"]
    monkeypatch.setattr(
        sys, "argv", ["script", "--output", str(tmp_path), *small, "--batch-scale", "1", "--shares", "geometry=0"]
    )
    script.main()
    assert {path.name for path in tmp_path.iterdir()} == {*assets.NAMES, "data", "work"}
    card = json.loads((tmp_path / "lgm" / "card.json").read_text())
    assert card["lgm"]["abs_rel"] < 2 * json.loads((assets.path("lgm") / "card.json").read_text())["lgm"]["abs_rel"]
    assert "translation_of_mean" in json.loads((tmp_path / "judge" / "card.json").read_text())
    assert LatentGeometryModel.from_pretrained(tmp_path / "lgm").config.lora_rank == 12
    assert audited == [(tmp_path / "lgm", torch.device("cpu"))]
    saved = [(tmp_path / "work" / name / "last.pt") for name in ("judge", "lgm")]
    times = [path.stat().st_mtime_ns for path in saved]
    script.main()
    assert [path.stat().st_mtime_ns for path in saved] == times  # finished: nothing is trained again


@pytest.mark.parametrize("slower", [1.05, 3.0], ids=["about as measured", "slower than measured"])
def test_the_steps_fit_the_time_and_the_best_is_kept(script, tmp_path, monkeypatch, slower):
    """A network that gets better, then worse; a step of it takes ten milliseconds when the steps are counted."""
    clock, kept = [0.0], []
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def run(schedule, folder, watch):
        folder.mkdir(parents=True)
        for step in range(1, schedule.steps + 1):
            clock[0] += 0.01 if watch is None else 0.01 * slower
            if watch is not None and (step % schedule.save_every == 0 or step == schedule.steps):
                watch(step, torch.tensor(float(step)))

    task = script.Task(Schedule(steps=9, lr=1.0), run, lambda x: x, lambda x, _: ({}, abs(float(x) - 200)), kept.append)
    monkeypatch.setattr(script, "task_of", lambda name, shop: (task, torch.tensor(0.0)))
    monkeypatch.setattr(script, "write_card", lambda *_: None)
    (tmp_path / "work").mkdir()
    script.train("judge", script.Shop(tmp_path, torch.device("cpu"), None, None, None, 0, []), 10.0, 1, None)
    plan = json.loads((tmp_path / "work" / "plan.json").read_text())["judge"]
    assert plan["steps"] == pytest.approx(script.PLANNED * (10 - 0.01 * 5 * script.CALIBRATION) / 0.01, abs=1)
    assert plan.get("finished", False) == (slower < 2) and clock[0] <= 11
    assert kept[-1] == 3 * -(-plan["steps"] // script.SAVES)  # of all saves the nearest to 200
