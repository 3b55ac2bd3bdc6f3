"""What is trained and how: full fine-tuning, averages, compilation, guarded ratios, cached conditions, validation."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from test_posttraining_trainer import config_for, rows
from test_posttraining_trainer import train as run

from vggrpo.checkpoint import load_latest
from vggrpo.config import load_config
from vggrpo.distributed import Processes
from vggrpo.errors import UserError
from vggrpo.models.wan import WanVideoModel
from vggrpo.posttraining import clipped_policy_loss, gaussian_kl
from vggrpo.posttraining.conditions import Conditions
from vggrpo.posttraining.policy import Policy
from vggrpo.posttraining.watch import MEMORY, BaseMotion, MotionWatch
from vggrpo.tracking import Tracker

FULL = ["model.tune=full", "optim.learning_rate=1e-4"]


def policy_of(pipeline, tmp_path, *overrides):
    config = config_for(pipeline, tmp_path, overrides)
    model = WanVideoModel.from_pretrained(pipeline)
    return Policy(config, model, Processes()), model


def set_gradients(policy, value):
    for parameter in policy.parameters:
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize("overrides", [[], FULL], ids=["lora", "full"])
def test_the_reference_is_the_model_at_the_start(tiny_wan_dir, tmp_path, overrides):
    policy, model = policy_of(tiny_wan_dir, tmp_path, *overrides)
    plain = WanVideoModel.from_pretrained(tiny_wan_dir)
    torch.manual_seed(0)
    x, t, text = torch.randn(1, 4, 2, 4, 4), torch.tensor([0.5]), torch.randn(1, 512, 16)
    set_gradients(policy, 1.0)
    policy.step(0)
    with torch.no_grad():
        tuned = model.predict_velocity(x, t, text)
        with policy.reference():
            torch.testing.assert_close(model.predict_velocity(x, t, text), plain.predict_velocity(x, t, text))
        assert torch.equal(model.predict_velocity(x, t, text), tuned)
    assert not torch.allclose(tuned, plain.predict_velocity(x, t, text), atol=1e-6)


def test_full_fine_tuning_in_bfloat16_keeps_float32_weights(tiny_wan_dir, tmp_path):
    run(tiny_wan_dir, tmp_path, [*FULL, "model.dtype=bfloat16"], updates=1)
    assert rows(tmp_path)[0]["grad_norm"] > 0
    adapter = load_latest(tmp_path / "checkpoints").tensors["adapter"]
    assert {value.dtype for value in adapter.values()} == {torch.float32}


def test_the_average_follows_its_formula_and_is_exported(tiny_wan_dir, tmp_path):
    policy, _ = policy_of(tiny_wan_dir, tmp_path, "optim.ema=0.75")
    expected = [p.detach().clone() for p in policy.parameters]
    for number in range(3):
        set_gradients(policy, 1.0)
        policy.step(number)
        expected = [0.75 * e + 0.25 * p.detach() for e, p in zip(expected, policy.parameters, strict=True)]
    now = [p.detach().clone() for p in policy.parameters]
    with policy.averaged():
        for ours, mean in zip(policy.parameters, expected, strict=True):
            torch.testing.assert_close(ours.detach(), mean)
    assert all(torch.equal(p, kept) for p, kept in zip(policy.parameters, now, strict=True))
    policy.export(tmp_path)
    exported = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert any(torch.allclose(mean, value) for value in exported.values() for mean in expected if mean.any())


def test_a_guarded_ratio_is_the_noise_times_the_shift():
    """log ratio + shift = eps . (mu - mu_old) / std on average, so times std it no longer depends on the step."""
    torch.manual_seed(0)
    old, shift, eps = torch.randn(3, 4, 50, dtype=torch.float64)
    for std in (0.03, 0.3):
        x, new = old + std * eps, old + 1e-3 * shift
        log_prob, old_log_prob = (torch.distributions.Normal(mean, std).log_prob(x).mean(1) for mean in (new, old))
        result = clipped_policy_loss(
            log_prob, old_log_prob, torch.ones(4, dtype=torch.float64), clip=0.5,
            mean_shift=gaussian_kl(new, old, torch.tensor(std)), std=std, step_length=0.1,
        )  # fmt: skip
        torch.testing.assert_close(result.ratio.log(), (eps * (new - old)).mean(1), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(result.per_sample, -result.ratio / 0.1)


def test_a_guarded_run_starts_at_ratio_one(tiny_wan_dir, tmp_path):
    run(tiny_wan_dir, tmp_path, ["grpo.ratio_norm=true"])
    assert rows(tmp_path)[0]["grad_norm"] > 0
    assert all(abs(row["ratio"] - 1) < 1e-2 for row in rows(tmp_path))


def test_cached_text_equals_the_encoder(tiny_wan_dir, tmp_path):
    prompts = ["a red box", "word " * 600]
    conditions = Conditions(config_for(tiny_wan_dir, tmp_path), prompts)
    model = WanVideoModel.from_pretrained(tiny_wan_dir)
    assert conditions.missing_prompts() == [*prompts, ""]
    conditions.encode(model, Processes())
    assert conditions.missing_prompts() == []
    cached = conditions.text(["", prompts[1], prompts[0]], torch.device("cpu"))
    with torch.no_grad():
        for row, prompt in zip(cached, ["", prompts[1], prompts[0]], strict=True):
            assert torch.equal(row, model.encode_prompt([prompt])[0])
    next(iter(conditions.folder.glob("text-*"))).write_bytes(b"")
    with pytest.raises(UserError, match="delete it"):
        conditions.text(["", *prompts], torch.device("cpu"))


def test_a_standstill_is_warned_of(caplog):
    watch = MotionWatch(0.5)
    watch.base = {"a": BaseMotion(2.0, 0.4, 0.3)}
    for number in range(MEMORY - 1):
        assert watch.metrics(["a"], 0.4, 0.4, 0.1, number)["camera_travel_ratio"] == pytest.approx(0.2)
        assert not caplog.text
    watch.metrics(["a"], 0.4, 0.4, 0.1, MEMORY - 1)
    assert "camera travel fell to 20 %" in caplog.text and "moving pixels" not in caplog.text
    assert "share of subject pixels fell to 33 %" in caplog.text


def test_videos_and_numbers_reach_every_tracker(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    calls = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: calls.append(("init", options["resume"], options["config"]))
    fake.log = lambda values, step: calls.append(("log", sorted(values), step))
    fake.Video = lambda path, format: path
    fake.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    frames = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    with Tracker(tmp_path, total=1, progress=False, trackers=["wandb"], settings={"seed": 1}) as tracker:
        tracker.log(0, {"loss": 1.0})
        tracker.validate(1, {"reward/x": 2.0}, [frames])
    assert calls == [
        ("init", "allow", {"seed": 1}), ("log", ["loss"], 0), ("log", ["validation/reward/x"], 1),
        ("log", ["validation/0"], 1), ("finish",),
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Images("validation/0")[0].encoded_image_string[:4] == b"GIF8"
    assert events.Scalars("validation/reward/x")[0].value == 2.0
    with pytest.raises(UserError, match=r"vggrpo\[trackio\]"):
        monkeypatch.setitem(sys.modules, "trackio", None)
        Tracker(tmp_path / "other", total=1, progress=False, trackers=["trackio"])


def test_the_step_size_grows_over_the_first_updates(tiny_wan_dir, tmp_path):
    run(tiny_wan_dir, tmp_path, ["optim.warmup_updates=4"], updates=2)
    assert [row["learning_rate"] for row in rows(tmp_path)] == pytest.approx([0.25e-3, 0.5e-3])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grpo": {"ratio_norm": True}, "sampling": {"variant": "cps"}}, "ratio_norm"),
        ({"validation": {"every": 1}, "data": {"prompts": "p.txt"}}, r"validation\.prompts"),
        ({"trackers": ["excel"]}, "trackers"),
    ],
)
def test_fields_that_do_not_fit(values, message):
    with pytest.raises(UserError, match=message):
        load_config(values)


def test_sharding_needs_several_processes(tiny_wan_dir, tmp_path):
    with pytest.raises(UserError, match="torchrun"):
        run(tiny_wan_dir, tmp_path, ["model.shard=true"])


@pytest.mark.parametrize(("size", "expected"), [(2, [5, 5]), (3, [4, 3, 3]), (4, [3, 3, 2, 2])])
def test_shares_cover_all_samples_once(size, expected):
    shares = [range(10)[Processes(rank, size).share(10)] for rank in range(size)]
    assert [len(share) for share in shares] == expected
    assert [i for share in shares for i in share] == list(range(10))
    with pytest.raises(UserError, match="cannot be shared by 11"):
        Processes(0, 11).share(10)
    with pytest.raises(UserError, match=r"model\.shard needs equal shares"):
        Processes(0, 3, even=True).share(10)
    assert Processes(1, 2, even=True).share(10) == slice(5, 10)
