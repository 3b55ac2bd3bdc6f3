"""Whole trainings of several runs each: what is cut and resumed, cut into micro-batches, or validated is the same
training."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
import test_posttraining_rivals as rivals
from fake_lgm import fake_lgm
from test_posttraining_memory import AUTO, memory_for
from test_posttraining_policy import FULL
from test_posttraining_trainer import PROMPTS, adapter, assert_same_run, config_for, rows, train

from vggrpo.checkpoint import load_latest
from vggrpo.models.lora import load_tuned
from vggrpo.models.wan import WanVideoModel
from vggrpo.posttraining import train as run_training
from vggrpo.rewards import camera_motion_smoothness
from vggrpo.rewards.registry import REWARDS

pytestmark = pytest.mark.e2e


def test_four_updates_equal_two_and_two(tiny_wan_dir, tmp_path):
    train(tiny_wan_dir, tmp_path / "whole", updates=4)
    train(tiny_wan_dir, tmp_path / "parts", updates=2)
    train(tiny_wan_dir, tmp_path / "parts", updates=4)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    before = (tmp_path / "parts" / "log.jsonl").read_text()
    train(tiny_wan_dir, tmp_path / "parts", updates=4)  # finished: nothing is done again
    assert (tmp_path / "parts" / "log.jsonl").read_text() == before


def test_a_reward_that_draws_random_numbers_goes_on_with_them(tiny_wan_dir, tmp_path, monkeypatch):
    """From the global generators of torch, NumPy and Python, as a plug-in may."""

    def restless(prediction, *, context=None):
        reward = camera_motion_smoothness(prediction)
        noise = torch.rand(len(reward.value)) + np.random.normal() + random.gauss(0, 1)
        return replace(reward, value=reward.value + noise)

    def begin(seed):
        random.seed(seed)
        np.random.seed(seed)

    monkeypatch.setitem(REWARDS, "restless", restless)
    begin(0)
    train(tiny_wan_dir, tmp_path / "whole", updates=4, rewards={"restless": 1})
    begin(0)
    train(tiny_wan_dir, tmp_path / "parts", updates=2, rewards={"restless": 1})
    begin(1)
    train(tiny_wan_dir, tmp_path / "parts", updates=4, rewards={"restless": 1})
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_saves_at_the_end_of_the_update(tiny_wan_dir, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    calls = []

    def lgm(latents):
        if not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(1)
        return fake_lgm(latents)

    with pytest.raises(KeyboardInterrupt, match="run again"):
        train(tiny_wan_dir, tmp_path / "parts", updates=3, save_every=100, lgm=lgm)
    assert load_latest(tmp_path / "parts" / "checkpoints").step == 1
    assert signal.getsignal(signal.SIGTERM) is handler
    train(tiny_wan_dir, tmp_path / "parts", updates=3, save_every=100)
    train(tiny_wan_dir, tmp_path / "whole", updates=3, save_every=100)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_micro_batches_do_not_change_the_gradient(tiny_wan_dir, tmp_path):
    """Nor do those of roll-out and reward; the second update has B off zero, so KL and ratio count."""
    for name, override in (("a", "grpo.micro_batch=64"), ("b", "grpo.micro_batch=3"), ("c", "lgm.micro_batch=3")):
        train(tiny_wan_dir, tmp_path / name, [override, "sampling.micro_batch=5", "grpo.inner_updates=1"])
    norms = [[row["grad_norm"] for row in rows(tmp_path / name)] for name in "abc"]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and norms[2] == pytest.approx(norms[0], rel=1e-3)


def test_a_resumed_run_ends_where_the_whole_one_does(tiny_wan_dir, tmp_path):
    rule = ["stop.kl_above=1e-12", "stop.memory=3"]
    train(tiny_wan_dir, tmp_path / "whole", rule, updates=5)
    for updates in (1, 2, 5):
        train(tiny_wan_dir, tmp_path / "parts", rule, updates=updates)
    assert load_latest(tmp_path / "parts" / "checkpoints").step == 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_full_fine_tuning_resumes_bit_for_bit_and_exports_a_transformer(tiny_wan_dir, tmp_path):
    from diffusers import WanTransformer3DModel

    train(tiny_wan_dir, tmp_path / "whole", FULL, updates=2)
    train(tiny_wan_dir, tmp_path / "parts", FULL, updates=1)
    exported = train(tiny_wan_dir, tmp_path / "parts", FULL, updates=2)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert rows(tmp_path / "whole")[1]["kl"] > 0  # the copy of the first weights is the reference
    loaded = WanTransformer3DModel.from_pretrained(str(exported)).state_dict()
    last = load_latest(tmp_path / "whole" / "checkpoints").tensors["adapter"]
    assert all(torch.equal(last[name], loaded[name]) for name in loaded)
    model = WanVideoModel.from_pretrained(tiny_wan_dir)
    before = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    load_tuned(model.transformer, exported)  # as `vggrpo generate --lora` does
    assert all(torch.equal(value, loaded[name]) for name, value in model.transformer.state_dict().items())
    assert "WanTransformer3DModel.from_pretrained" in (exported / "README.md").read_text()
    assert sum(not torch.equal(before[name], loaded[name]) for name in loaded) > len(loaded) / 2


def test_the_average_resumes_bit_for_bit(tiny_wan_dir, tmp_path):
    for name, parts in (("whole", [2]), ("parts", [1, 2])):
        for updates in parts:
            train(tiny_wan_dir, tmp_path / name, ["optim.ema=0.9"], updates=updates)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_validation_leaves_videos_and_numbers_and_changes_nothing(tiny_wan_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red box\nblue\n")
    options = [
        "validation.every=1", f"validation.prompts={tmp_path / 'prompts.txt'}", "validation.num_steps=2",
        "validation.videos=1",
    ]  # fmt: skip
    train(tiny_wan_dir, tmp_path / "a", options)
    train(tiny_wan_dir, tmp_path / "b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    lines = [json.loads(line) for line in (tmp_path / "a" / "validation.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 1, 2]
    assert lines[0]["camera_travel"] == pytest.approx(lines[0]["camera_travel_base"])  # nothing is tuned yet
    assert lines[2]["reward/camera_motion_smoothness"] != lines[0]["reward/camera_motion_smoothness"]
    assert (tmp_path / "a" / "validation" / "000002" / "0.mp4").is_file()
    assert "| quantity | after 0 updates | after 2 |" in (tmp_path / "a" / "lora" / "README.md").read_text()


def test_prompts_are_encoded_once_and_the_encoder_is_not_loaded_again(tiny_wan_dir, tmp_path, monkeypatch):
    first = run_training(
        config_for(tiny_wan_dir, tmp_path / "a", [f"data.cache={tmp_path / 'cache'}"]),
        lgm=fake_lgm, prompts=PROMPTS, progress=False,
    )  # fmt: skip
    loaded = []
    load = WanVideoModel.from_pretrained.__func__

    def spy(cls, *arguments, load_text=True, load_vae=True, **options):
        loaded.append((load_text, load_vae))
        return load(cls, *arguments, load_text=load_text, load_vae=load_vae, **options)

    monkeypatch.setattr(WanVideoModel, "from_pretrained", classmethod(spy))
    second = run_training(
        config_for(tiny_wan_dir, tmp_path / "b", [f"data.cache={tmp_path / 'cache'}"]),
        lgm=fake_lgm, prompts=PROMPTS, progress=False,
    )  # fmt: skip
    assert loaded == [(False, False)] and first != second
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_smaller_micro_batch_resumes(tiny_wan_dir, tmp_path):
    """It is what the message after running out of memory asks for."""
    train(tiny_wan_dir, tmp_path, updates=1)
    train(tiny_wan_dir, tmp_path, ["grpo.micro_batch=2", "sampling.micro_batch=3"], updates=2)
    assert [row["update"] for row in rows(tmp_path)] == [0, 1] and adapter(tmp_path)


def test_a_run_finds_its_sizes_and_keeps_them_at_resume(tiny_wan_dir, tmp_path, monkeypatch):
    train(tiny_wan_dir, tmp_path / "whole", AUTO, updates=2)
    train(tiny_wan_dir, tmp_path / "parts", AUTO, updates=1)
    memory_for(monkeypatch, items=0)
    train(tiny_wan_dir, tmp_path / "parts", AUTO, updates=2)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_a_damaged_checkpoint_costs_one_update(tiny_wan_dir, tmp_path):
    for name in ("whole", "damaged"):
        train(tiny_wan_dir, tmp_path / name)
    last = tmp_path / "damaged" / "checkpoints" / "step-000002"
    (last / "tensors.pt").write_bytes(b"")
    train(tiny_wan_dir, tmp_path / "damaged")
    assert_same_run(tmp_path / "whole", tmp_path / "damaged")


@pytest.mark.parametrize("algorithm", rivals.ALGORITHMS)
def test_one_and_one_updates_of_a_rival_equal_two(tiny_wan_dir, tmp_path, algorithm):
    rivals.run(algorithm, tiny_wan_dir, tmp_path / "whole")
    for updates in (1, 2):
        rivals.run(algorithm, tiny_wan_dir, tmp_path / "parts", f"updates={updates}")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
