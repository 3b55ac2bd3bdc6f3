"""Training the shipped models further within a time limit: benchmarks/pretrain_gpu.py in small, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from vggrpo import assets
from vggrpo.evaluation import audit
from vggrpo.lgm import LatentGeometryModel
from vggrpo.pretraining import data, lgm, loop
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


def test_in_short(script, tmp_path, monkeypatch):
    """Two networks side by side and the LGM after them, on clips that are rendered first."""
    audited = []
    monkeypatch.setattr(audit, "audit_reward", lambda lgm, *_, **options: audited.append((lgm, options["device"])))
    monkeypatch.setattr(lgm, "AUDIT_CLIPS", 96)
    monkeypatch.setattr(data, "SHARD_SIZE", 256)  # put back afterwards
    small = ["--seconds", "1", "--device", "cpu", "--clips", "8", "--batch-scale", "1"]
    monkeypatch.setattr(sys, "argv", ["script", "--output", str(tmp_path), *small, "--networks", "judge", "vae", "lgm"])
    script.main()
    assert {path.name for path in tmp_path.iterdir()} == {*assets.NAMES, "data", "work"}
    card = json.loads((tmp_path / "lgm" / "card.json").read_text())
    assert card["lgm"]["abs_rel"] < 2 * json.loads((assets.path("lgm") / "card.json").read_text())["lgm"]["abs_rel"]
    assert "translation_of_mean" in json.loads((tmp_path / "judge" / "card.json").read_text())
    assert json.loads((tmp_path / "pipeline" / "card.json").read_text())["psnr"] > 20
    assert LatentGeometryModel.from_pretrained(tmp_path / "lgm").config.lora_rank == 0
    assert audited == [(tmp_path / "lgm", torch.device("cpu"))]
    trained = [json.loads((tmp_path / "work" / f"{name}.json").read_text()) for name in ("judge", "vae")]
    assert all(one["steps"] >= 1 for one in trained)
    saved = [(tmp_path / "work" / name / "last.pt") for name in ("judge", "vae")]
    times = [path.stat().st_mtime_ns for path in saved]
    script.main()
    assert [path.stat().st_mtime_ns for path in saved] == times  # finished: nothing is trained again


@pytest.mark.parametrize("step", [0.05, 0.5], ids=["quick", "slow"])
def test_the_schedule_follows_the_clock(tmp_path, monkeypatch, step):
    """Ten seconds of training, whatever a step takes, the learning rate at its end; killed, it has what was left."""
    clock, rates = [0.0], []
    monkeypatch.setattr(loop.time, "time", lambda: clock[0])
    schedule = Schedule(steps=1000, lr=1.0, warmup=10, ema=0, seconds=10.0, save_every=200)

    def loss(model, place, generator):
        clock[0] += step
        rates.append((place, schedule.lr_at(place)))
        return model(torch.ones(1, 1)).sum(), {}

    def stop(count, model):
        if clock[0] > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.fit(torch.nn.Linear(1, 1), loss, schedule, tmp_path, stop)
    clock[0] += 1000.0  # between the two calls
    loop.fit(torch.nn.Linear(1, 1), loss, schedule, tmp_path)
    assert len(rates) == pytest.approx(10 / step, abs=2)
    assert [place for place, _ in rates] == sorted(place for place, _ in rates)
    assert rates[-1][0] > 940 and rates[-1][1] < 0.05


def test_the_best_is_kept(script, tmp_path, monkeypatch):
    """A network that gets better, then worse."""
    kept = []
    task = script.Task(
        Schedule(steps=6, lr=1.0),
        lambda schedule, folder, watch: [watch(n, torch.tensor(float(n))) for n in range(1, 7)],
        lambda x: x,
        kept.append,
    )
    monkeypatch.setattr(script, "task_of", lambda name, shop: task)
    monkeypatch.setattr(script, "best_of", lambda name, shop: torch.tensor(0.0))
    monkeypatch.setattr(script, "measure", lambda name, model, clips: ({}, abs(float(model) - 3)))
    monkeypatch.setattr(script.Shop, "load", lambda *_: None)
    (tmp_path / "work").mkdir()
    script.train("judge", script.Shop(tmp_path, torch.device("cpu"), [], [], [], tmp_path, tmp_path), 10.0, 1)
    assert [float(one) for one in kept] == [1, 2, 3]
    assert json.loads((tmp_path / "work" / "judge.json").read_text())["steps"] == 6
