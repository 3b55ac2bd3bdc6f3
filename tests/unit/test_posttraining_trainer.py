"""The GRPO trainer on a random tiny pipeline: golden numbers, bit-exact repeat, guards.

`python tests/unit/test_posttraining_trainer.py` writes the golden numbers anew.
"""

from __future__ import annotations

import errno
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from fake_lgm import fake_lgm
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_wan import save_tiny_wan

from vggrpo.checkpoint import load_latest
from vggrpo.config import load_config
from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction
from vggrpo.models.wan import WanVideoModel
from vggrpo.posttraining import train as run_training
from vggrpo.posttraining import trainer
from vggrpo.posttraining.grpo import GRPO
from vggrpo.posttraining.policy import Policy
from vggrpo.posttraining.replay import Replayer, all_transitions, inner_parts

GOLDEN = Path(__file__).parents[1] / "golden" / "grpo_losses.json"
GOLDEN_KEYS = ("reward/camera_motion_smoothness", "camera_travel", "camera_travel_base", "grad_norm", "kl")
PROMPTS = ["a red box", "the sphere rolls", "blue box"]


def config_for(pipeline, output, overrides=(), **changes):
    values = {
        "output": str(output),
        "updates": 2,
        "save_every": 1,
        "model": {"path": str(pipeline)},
        "data": {"num_frames": 13, "height": 32, "width": 32},
        "sampling": {"num_steps": 4, "window": 2},
        "rewards": {"camera_motion_smoothness": 1, "geometry_reprojection_consistency": 1, "camera_motion_hinge": 0.5},
        "grpo": {"prompts_per_update": 2, "samples_per_prompt": 4, "micro_batch": 6, "inner_updates": 2},
        "lora": {"rank": 2},
        "optim": {"learning_rate": 1e-3},
    }
    return load_config(values | changes, overrides)


def train(pipeline, output, overrides=(), lgm=fake_lgm, **changes):
    return run_training(config_for(pipeline, output, overrides, **changes), lgm=lgm, prompts=PROMPTS, progress=False)


def rows(output):
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in lines]


def adapter(output):
    return load_file(Path(output) / "lora" / "pytorch_lora_weights.safetensors")


def assert_same_run(one, two):
    assert rows(one) == rows(two)
    first, second = adapter(one), adapter(two)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    states = [load_latest(Path(path) / "checkpoints").tensors["optimizer"]["state"] for path in (one, two)]
    for index, moments in states[0].items():
        assert all(torch.equal(moments[key], states[1][index][key]) for key in moments)


@pytest.fixture(scope="module")
def two_updates(tiny_wan_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    train(tiny_wan_dir, output)
    return output


def test_golden_numbers(two_updates):
    golden = json.loads(GOLDEN.read_text())
    for row, expected in zip(rows(two_updates), golden, strict=True):
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=0.02, abs=1e-9), key


def test_what_a_run_leaves(two_updates, tiny_wan_dir):
    from diffusers import WanPipeline

    log = rows(two_updates)
    assert [row["update"] for row in log] == [0, 1]
    assert log[0]["ratio_deviation"] < 0.05 and log[0]["grad_norm"] > 0
    assert log[0]["group_std/camera_motion_smoothness"] > 0 and log[0]["groups/skipped"] == 0
    assert any(value.any() for key, value in adapter(two_updates).items() if "lora_B" in key)
    assert list((two_updates / "tensorboard").iterdir()) and (two_updates / "config.yaml").is_file()
    pipe = WanPipeline.from_pretrained(str(tiny_wan_dir))
    pipe.load_lora_weights(str(two_updates / "lora"))
    names = [name for name, _ in pipe.transformer.named_parameters() if "lora_B" in name]
    assert len(names) == len(adapter(two_updates)) // 2


def test_repeats_bit_for_bit(two_updates, tiny_wan_dir, tmp_path):
    train(tiny_wan_dir, tmp_path)
    assert_same_run(two_updates, tmp_path)


def test_another_config_does_not_resume(two_updates, tiny_wan_dir):
    with pytest.raises(UserError, match=r"optim\.learning_rate: was 0\.001, is 0\.5"):
        train(tiny_wan_dir, two_updates, ["optim.learning_rate=0.5"])
    config = config_for(tiny_wan_dir, two_updates)
    with pytest.raises(UserError, match="prompts"):
        run_training(config, lgm=fake_lgm, prompts=["another"], progress=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.targets=[to_quack]", "match no linear layer.*to_q"),
        ("data.num_frames=12", "nearest is 13"),
        ("data.height=20", "multiple of 16"),
        ("rewards={smoothness: 1}", "camera_motion_smoothness"),
        ("model.device=quantum", "no device"),
        ("model.path=/nowhere", "WanPipeline"),
    ],
)
def test_bad_input_is_a_user_error(tiny_wan_dir, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        train(tiny_wan_dir, tmp_path, [override])
    assert not (tmp_path / "log.jsonl").exists()


def test_groups_without_spread_are_counted_and_change_nothing(tiny_wan_dir, tmp_path):
    def constant(latents):
        return fake_lgm(torch.zeros_like(latents) + torch.linspace(0, 1, latents.shape[2]).view(1, 1, -1, 1, 1))

    train(tiny_wan_dir, tmp_path, lgm=constant, updates=1)
    assert rows(tmp_path)[0]["groups/skipped"] == 2
    assert not any(value.any() for key, value in adapter(tmp_path).items() if "lora_B" in key)


@pytest.mark.parametrize("invalid", ["worst", "drop"])
def test_invalid_samples_are_counted(tiny_wan_dir, tmp_path, invalid):
    def broken(latents) -> GeometryPrediction:
        prediction = fake_lgm(latents)
        prediction.depth[0] = torch.nan
        return prediction

    train(tiny_wan_dir, tmp_path, [f"grpo.invalid={invalid}"], lgm=broken, updates=1)
    row = rows(tmp_path)[0]
    assert row["samples/invalid"] == 1 and row["grad_norm"] > 0


def test_a_non_finite_loss_stops_before_the_optimizer(tiny_wan_dir, tmp_path, monkeypatch):
    train(tiny_wan_dir, tmp_path, updates=1)
    before = adapter(tmp_path)
    monkeypatch.setattr(GRPO, "_advantages", lambda self, values, valid, group: torch.full((8,), torch.nan))
    with pytest.raises(UserError, match="not finite in update 1"):
        train(tiny_wan_dir, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in adapter(tmp_path).items())
    assert not list(tmp_path.glob("nonfinite*"))  # the last checkpoint is that of the update's start


def test_an_update_that_was_not_finite_is_repeated_alone(tiny_wan_dir, tmp_path, monkeypatch):
    """The second of its two steps fails, after the first has changed the weights; nothing was saved since the start.
    The geometry draws random numbers, as a reward may."""
    failed = []

    def drawing(latents):
        return fake_lgm(latents + 0.1 * torch.rand(()))

    plain = Policy.step

    def step(self, number, *, loss=0.0):
        self.numbers = [*getattr(self, "numbers", []), number]
        if self.numbers.count(1) == 2:
            failed.append([parameter.grad.clone() for parameter in self.parameters])
            loss = math.nan
        return plain(self, number, loss=loss)

    monkeypatch.setattr(Policy, "step", step)
    with pytest.raises(UserError, match="nonfinite-000001 on the same command"):
        train(tiny_wan_dir, tmp_path, updates=3, save_every=3, lgm=drawing)
    with pytest.raises(UserError, match=r"not finite in update 1.*the same command repeats it"):
        train(tiny_wan_dir, tmp_path / "nonfinite-000001", updates=3, save_every=3, lgm=drawing)
    first, again = failed
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert any(gradient.any() for gradient in first)


def test_a_ratio_off_one_is_recomputed_and_said(tiny_wan_dir, tmp_path, monkeypatch, caplog):
    old = GRPO._rollout

    def shifted(self, *arguments):
        trajectory = old(self, *arguments)
        trajectory.log_probs.add_(1e-3)
        return trajectory

    monkeypatch.setattr(GRPO, "_rollout", shifted)
    train(tiny_wan_dir, tmp_path, ["grpo.inner_updates=1"])
    assert "recomputed" in caplog.text
    assert all(row["ratio_deviation"] < 1e-5 for row in rows(tmp_path))


def test_a_network_that_never_repeats_itself_is_refused(tiny_wan_dir, tmp_path, monkeypatch):
    plain = WanVideoModel.predict_velocity

    def noisy(self, *arguments):
        velocity = plain(self, *arguments)
        return velocity + 0.1 * torch.randn_like(velocity)  # as dropout that was left on

    monkeypatch.setattr(WanVideoModel, "predict_velocity", noisy)
    with pytest.raises(UserError, match="not deterministic; switch off dropout"):
        train(tiny_wan_dir, tmp_path, ["grpo.inner_updates=1"])
    assert load_latest(tmp_path / "checkpoints") is None


@pytest.mark.parametrize(("owner", "where"), [(Replayer, "backward"), (GRPO, "_rollout")])
def test_out_of_memory_names_the_settings(tiny_wan_dir, tmp_path, monkeypatch, owner, where):
    def full(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(owner, where, full)
    with pytest.raises(UserError, match="out of memory") as error:
        train(tiny_wan_dir, tmp_path)
    for setting in ("grpo.micro_batch", "sampling.micro_batch", "lgm.micro_batch", "model.gradient_checkpointing"):
        assert setting in str(error.value)


def test_a_full_disk_says_what_to_do():
    with pytest.raises(UserError, match=r"No space left.*free space"), trainer._advice():
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=r"No space left.*free space"), trainer._advice():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(FileNotFoundError), trainer._advice():
        raise FileNotFoundError(errno.ENOENT, "another matter")


@pytest.mark.parametrize(
    "override",
    [
        "sampling.variant=dance",
        "sampling.variant=cps",
        "grpo.kl_unit=diffusion",
        "grpo.kl=0",
        "sampling.shared_noise=true",
        "sampling.guidance_scale=2",
        "model.gradient_checkpointing=true",
        "model.dtype=bfloat16",
        "grpo.mode=sum",
        "grpo.inner_split=false",
        "sampling.window_kind=random",
        "sampling.offload=true",
        "sampling.variant=flow_grpo_wan sampling.sigma_min=0.1 sampling.sigma_max=0.7",
        "sampling.micro_batch=auto validation.every=1",
    ],
)
def test_options_run(tiny_wan_dir, tmp_path, override):
    validation = ["validation.num_prompts=1", "validation.num_steps=2", f"validation.prompts={tmp_path / 'p.txt'}"]
    (tmp_path / "p.txt").write_text("a prompt\n")
    train(tiny_wan_dir, tmp_path / "run", [*validation, *override.split()], updates=1)
    assert rows(tmp_path / "run")[0]["grad_norm"] > 0


def test_inner_parts_cover_everything_once():
    transitions = all_transitions(torch.tensor([1, 3, 4]), 3)
    assert transitions.shape == (9, 2)
    parts = list(inner_parts(transitions, 2, True, seed=0))
    assert sorted(map(tuple, torch.cat(parts).tolist())) == sorted(map(tuple, transitions.tolist()))
    assert [len(part) for part in inner_parts(transitions, 2, False, seed=0)] == [9, 9]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        train(save_tiny_wan(Path(folder) / "wan"), Path(folder) / "run")
        kept = [{key: row[key] for key in GOLDEN_KEYS} for row in rows(Path(folder) / "run")]
    GOLDEN.write_text(json.dumps(kept, indent=1) + "\n")


def test_the_lora_has_a_model_card(tiny_wan_dir, tmp_path):
    import yaml

    lora = train(tiny_wan_dir, tmp_path / "run")
    card = (lora / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == str(tiny_wan_dir) and "lora" in front["tags"]
    assert "2 of 2 updates" in card and "`geometry_reprojection_consistency`, weight 1" in card
    assert "- geometry model behind the rewards: Apache-2.0, shipped" in card
    assert f"- base pipeline: as the publisher of {tiny_wan_dir} states" in card
    reward = rows(tmp_path / "run")[-1]["reward/camera_motion_smoothness"]
    assert f"| reward/camera_motion_smoothness | {reward:.5g} |" in card
