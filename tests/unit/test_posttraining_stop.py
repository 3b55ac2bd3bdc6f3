"""Rules that end a run: what they watch, that the run is saved and stays ended, and that it says why in one line."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import yaml
from fake_lgm import fake_lgm
from test_posttraining_trainer import PROMPTS, config_for, rows, train

from vggrpo.checkpoint import load_latest
from vggrpo.cli import main
from vggrpo.config import load_config
from vggrpo.config_algorithms import StopConfig
from vggrpo.errors import UserError
from vggrpo.posttraining import trainer
from vggrpo.posttraining.watch import StopRule


def standstill(calls_before):
    """An LGM to whose eyes the camera stops after so many calls."""
    calls = []

    def lgm(latents):
        prediction = fake_lgm(latents)
        calls.append(1)
        if len(calls) <= calls_before:
            return prediction
        cam2world = prediction.cam2world.clone()
        cam2world[..., :3, 3] *= 0.05
        return replace(prediction, cam2world=cam2world)

    return lgm


TRAVEL = ["stop.travel_below=0.5", "stop.memory=1"]


def test_a_camera_that_stops_ends_the_run_for_good(tiny_wan_dir, tmp_path, caplog):
    # Update 0 calls the LGM for the base model and for its clips; the clips of update 1 come after another base call.
    lora = train(tiny_wan_dir, tmp_path, TRAVEL, lgm=standstill(3), updates=5, save_every=100)
    (line,) = [record.getMessage() for record in caplog.records if "stopped after" in record.getMessage()]
    assert line.startswith("stopped after update 2 of 5: the camera travel") and "stop.travel_below 0.5" in line
    assert len(rows(tmp_path)) == 2 and load_latest(tmp_path / "checkpoints").step == 2
    assert (lora / "pytorch_lora_weights.safetensors").is_file() and "2 of 5 updates" in (
        lora / "README.md"
    ).read_text()
    caplog.clear()
    train(tiny_wan_dir, tmp_path, TRAVEL, updates=5, save_every=100)
    assert len(rows(tmp_path)) == 2 and "ended after update 2 of 5" in caplog.text
    train(tiny_wan_dir, tmp_path, updates=3, save_every=100)  # without the rule it goes on
    assert len(rows(tmp_path)) == 3


def test_the_command_ends_well_and_says_why(tiny_wan_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(trainer, "load_reader", lambda config, model: fake_lgm)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    overrides = ["stop.kl_above=1e-12", "stop.memory=2", f"data.prompts={tmp_path / 'prompts.txt'}"]
    config = config_for(tiny_wan_dir, tmp_path / "run", overrides, updates=4)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    handler = logging.StreamHandler()  # what Python does with warnings when nothing is set up
    logging.getLogger("vggrpo").addHandler(handler)
    try:
        assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    finally:
        logging.getLogger("vggrpo").removeHandler(handler)
    assert load_latest(tmp_path / "run" / "checkpoints").step == 2
    assert capfd.readouterr().err.count("stopped after update 2 of 4: the KL to the base model is") == 1


def test_seconds_end_a_run(tiny_wan_dir, tmp_path, caplog):
    train(tiny_wan_dir, tmp_path, ["stop.seconds_above=1e-6"], updates=3)
    assert len(rows(tmp_path)) == 1 and "stop.seconds_above" in caplog.text


def test_a_rule_waits_for_its_memory_and_leaves_out_what_is_unknown():
    rule = StopRule(StopConfig(travel_below=0.8, memory=3))
    for value, expected in ((0.9, None), (0.6, None), (math.nan, "0.75"), (0.9, "0.75"), (0.9, None)):
        rule.observe({"camera_travel_ratio": value, "kl": 9.0}, seconds=1.0)
        reason = rule.reason()
        assert (reason is None) if expected is None else (expected in reason), value
    again = StopRule(rule.settings, rule.state())
    assert again.reason() == rule.reason() and again.seconds == 5.0
    assert StopRule(StopConfig(kl_above=8, memory=3), rule.state()).reason() is not None  # a changed rule, the same log
    assert StopRule(StopConfig()).reason() is None


def test_a_rule_that_watches_nothing_says_so_once(caplog):
    rule = StopRule(StopConfig(dynamics_below=0.5, kl_above=1))
    for _ in range(3):
        rule.observe({"kl": 0.1}, seconds=1.0)
    assert caplog.text.count("stop.dynamics_below has no effect") == 1 and "kl_above" not in caplog.text


def test_what_a_rule_needs():
    with pytest.raises(UserError, match=r"stop\.travel_below.*base_travel_samples"):
        load_config({"stop": {"travel_below": 0.5}, "grpo": {"base_travel_samples": 0}})
    with pytest.raises(UserError, match=r"stop\.memory"):
        load_config({"stop": {"memory": 0}})
