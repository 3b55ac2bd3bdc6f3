"""Micro-batches that find their size, and trajectories in a narrow format: less memory, the same training."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from test_posttraining_trainer import PROMPTS, config_for, fake_lgm, rows, train

from vggrpo.config import load_config
from vggrpo.distributed import Processes
from vggrpo.errors import UserError
from vggrpo.models import memory
from vggrpo.models.wan import WanVideoModel
from vggrpo.posttraining import micro_batch
from vggrpo.posttraining.algorithm import Context
from vggrpo.posttraining.conditions import Conditions
from vggrpo.posttraining.grpo import GRPO
from vggrpo.posttraining.micro_batch import MicroBatch, replay_micro_batch, rollout_micro_batch
from vggrpo.posttraining.policy import Policy
from vggrpo.posttraining.replay import OldPolicy, all_transitions

CPU = torch.device("cpu")
AUTO = ["grpo.micro_batch=auto", "sampling.micro_batch=auto"]


def memory_for(monkeypatch, items, item_bytes=1000.0):
    """Free memory in which just `items` items fit."""
    monkeypatch.setattr(micro_batch, "free_memory", lambda device: int(items * item_bytes / micro_batch.SHARE + 1))


def grpo_of(pipeline, output, *overrides):
    """An untouched run whose LoRA B is not zero, so that no gradient is."""
    config = config_for(pipeline, output, overrides)
    model, processes = WanVideoModel.from_pretrained(pipeline), Processes()
    conditions = Conditions(config, PROMPTS, ())
    conditions.encode(model, processes)
    policy = Policy(config, model, processes)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named.items():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return GRPO(Context(config, model, policy, fake_lgm, PROMPTS, conditions, processes))


def gradient_of(grpo):
    """Of the update's first optimizer step, written out from the roll-out on."""
    prompts = [PROMPTS[i // 4] for i in range(8)]
    text = grpo._encode(prompts)
    trajectory = grpo._rollout(0, range(8), prompts, text, (1, 2))
    chosen = all_transitions(torch.arange(8), 2)
    old = OldPolicy.of(trajectory, chosen)
    grpo.replayer.backward(trajectory, text, chosen, old, torch.linspace(-1, 1, 8), len(chosen))
    return torch.cat([parameter.grad.flatten() for parameter in grpo.policy.parameters])


@pytest.fixture(scope="module")
def one_by_one(tiny_wan_dir, tmp_path_factory):
    grpo = grpo_of(tiny_wan_dir, tmp_path_factory.mktemp("one"), "grpo.micro_batch=1", "sampling.micro_batch=1")
    gradient = gradient_of(grpo)
    assert gradient.norm() > 0
    return gradient


@pytest.mark.parametrize(("fits", "size"), [(5, 5), (0.1, 1), (1000, 1000)])
def test_auto_takes_what_fits_and_gives_the_gradient_of_one_by_one(
    tiny_wan_dir, tmp_path, monkeypatch, one_by_one, fits, size
):
    grpo = grpo_of(tiny_wan_dir, tmp_path, *AUTO)
    at_once = grpo.replayer.micro_batch
    free = (fits * at_once.item_bytes) / micro_batch.SHARE + at_once.reserve + 1
    monkeypatch.setattr(micro_batch, "free_memory", lambda device: int(free))
    gradient = gradient_of(grpo)
    assert at_once.found == size
    assert (gradient - one_by_one).norm() < 1e-5 * one_by_one.norm()


def test_out_of_memory_halves_and_gives_the_same_gradient(tiny_wan_dir, tmp_path, monkeypatch, one_by_one, caplog):
    """The network takes three videos at most, the estimate knows nothing of it; parts of the gradient that were there
    already when it happened do not count twice."""
    grpo = grpo_of(tiny_wan_dir, tmp_path, *AUTO)
    predict = grpo.model.predict_velocity

    def narrow(latents, t, text):
        if len(latents) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(latents, t, text)

    backward = torch.Tensor.backward
    failed = []

    def late(self, *arguments, **options):
        backward(self, *arguments, **options)
        if not failed:  # the first micro-batch of all: its gradient lies there already
            failed.append(1)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(grpo.model, "predict_velocity", narrow)
    monkeypatch.setattr(torch.Tensor, "backward", late)
    with caplog.at_level(logging.WARNING):
        gradient = gradient_of(grpo)
    assert failed and grpo.at_once.found == 2 and grpo.replayer.micro_batch.found == 1
    assert "out of memory with 16 at once; going on with 8" in caplog.text
    assert (gradient - one_by_one).norm() < 1e-5 * one_by_one.norm()


def test_checkpointing_computes_the_blocks_twice_and_gives_the_same_gradient(tiny_wan_dir, tmp_path, one_by_one):
    grpo = grpo_of(tiny_wan_dir, tmp_path, "model.gradient_checkpointing=true", "grpo.micro_batch=8")
    transformer, calls = grpo.model.transformer, []
    assert transformer.is_gradient_checkpointing
    transformer.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1) if torch.is_grad_enabled() else None)
    gradient = gradient_of(grpo)
    assert len(calls) == 2 * 2  # two micro-batches of 8 transitions
    assert (gradient - one_by_one).norm() < 1e-5 * one_by_one.norm()


def test_what_does_not_fit_one_by_one_or_was_given_is_an_error(monkeypatch):
    def full(size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(size):
        raise RuntimeError("another matter")

    memory_for(monkeypatch, items=100, item_bytes=1.0)
    for setting in ("auto", 8):
        with pytest.raises(torch.OutOfMemoryError):
            MicroBatch(setting).run(4, CPU, full)
    with pytest.raises(RuntimeError, match="another matter"):
        MicroBatch("auto").run(4, CPU, broken)
    tried = []

    def noted(size):
        tried.append(size)
        full(size)

    with pytest.raises(torch.OutOfMemoryError):  # the other processes would wait for one that starts over
        MicroBatch("auto", processes=Processes(even=True)).run(4, CPU, noted)
    assert tried == [4]


def test_the_size_is_found_once_and_given_numbers_are_taken(monkeypatch):
    memory_for(monkeypatch, items=6)
    at_once = MicroBatch("auto", item_bytes=1000.0)
    assert at_once.run(2, CPU, lambda size: size) == 2  # fewer items first do not bind later calls
    memory_for(monkeypatch, items=1)
    assert [at_once.run(count, CPU, lambda size: size) for count in (10, 4, 0)] == [6, 4, 1]
    assert MicroBatch(32).run(4, CPU, lambda size: size) == 32


def test_items_cost_what_the_account_says(tiny_wan_dir, tmp_path):
    model = WanVideoModel.from_pretrained(tiny_wan_dir)
    config = config_for(tiny_wan_dir, tmp_path, AUTO)
    shape = memory.shape_of(model)
    assert shape == memory.TransformerShape(24, 48, 2)
    tokens, latent = 4 * 2 * 2, 4 * 4 * 4 * 4 * 4
    states = micro_batch.LATENT_COPIES * latent
    rolled = rollout_micro_batch(config, model, Processes(), kept=8)
    assert rolled.item_bytes == pytest.approx(4 * tokens * (4.5 * 24 + 2 * 48) + states)
    assert rolled.reserve == 8 * (2 + 1) * latent
    replayed = replay_micro_batch(config, model, Processes()).item_bytes
    assert replayed == pytest.approx(4 * tokens * 2 * memory.block_values(shape) + states)
    saving = config_for(tiny_wan_dir, tmp_path, [*AUTO, "model.gradient_checkpointing=true"])
    assert replay_micro_batch(saving, model, Processes()).item_bytes < replayed
    model.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="numbers"):
        rollout_micro_batch(config, model, Processes())


def test_free_memory_of_machine_container_and_gpu(tmp_path, monkeypatch):
    free = memory.free_memory(CPU)
    assert free > 2**20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_memory(CPU) < 0.75 * free
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert memory.free_memory(CPU) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(CPU) > 2**20
    cuda = {"mem_get_info": (100, 800), "memory_reserved": 60, "memory_allocated": 20}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_memory(SimpleNamespace(type="cuda")) == 100 + 60 - 20


@pytest.mark.parametrize("value", [0, -1, "many", True, 2.5])
def test_a_micro_batch_is_a_number_or_auto(value):
    with pytest.raises(UserError, match=r"grpo\.micro_batch.*whole number from 1, or auto"):
        load_config({"grpo": {"micro_batch": value}})
    assert load_config({"grpo": {"micro_batch": "auto"}}).grpo.micro_batch == "auto"


@pytest.mark.parametrize("network", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", [False, True])
def test_trajectories_in_bfloat16_start_at_ratio_one(tiny_wan_dir, tmp_path, network, offload, monkeypatch):
    """Below 1e-5 with a network in float32 and below a tenth of the clip with one in bfloat16, with states in bfloat16;
    a replay of rounded states under unrounded log-probabilities would be off by a hundred times that."""
    kept = []
    plain = GRPO._rollout

    def noted(self, *arguments):
        kept.append(plain(self, *arguments))
        return kept[-1]

    monkeypatch.setattr(GRPO, "_rollout", noted)
    overrides = [f"model.dtype={network}", "sampling.trajectory_dtype=bfloat16", f"sampling.offload={offload}"]
    train(tiny_wan_dir, tmp_path, [*overrides, "grpo.inner_updates=1", "sampling.window_kind=random"], updates=1)
    states = [*kept[0].samples, *kept[0].next_samples]
    assert all(state.dtype == torch.bfloat16 and state.device == CPU for state in states)
    row = rows(tmp_path)[0]
    clip = 1e-3
    assert row["ratio_deviation"] < (1e-5 if network == "float32" else clip / 10) and row["grad_norm"] > 0


def test_rounding_what_is_kept_alone_would_move_the_ratio(tiny_wan_dir, tmp_path):
    grpo = grpo_of(tiny_wan_dir, tmp_path)
    prompts = [PROMPTS[i // 4] for i in range(8)]
    text = grpo._encode(prompts)
    exact = grpo._rollout(0, range(8), prompts, text, (1, 2))
    rounded = [tuple(x.bfloat16() for x in states) for states in (exact.samples, exact.next_samples)]
    naive = SimpleNamespace(**vars(exact) | {"samples": rounded[0], "next_samples": rounded[1], "mask": None})
    chosen = all_transitions(torch.arange(8), 2)
    with torch.no_grad():
        again = grpo.replayer.step(naive, text, chosen).log_prob
    assert float((again - OldPolicy.of(exact, chosen).log_probs).abs().max()) > 1e-4


def test_bfloat16_trajectories_train_alike(tiny_wan_dir, tmp_path):
    for name in ("float32", "bfloat16"):
        train(tiny_wan_dir, tmp_path / name, [f"sampling.trajectory_dtype={name}"], updates=1)
    exact, narrow = rows(tmp_path / "float32")[0], rows(tmp_path / "bfloat16")[0]
    for key in ("camera_travel", "reward/camera_motion_smoothness"):
        assert narrow[key] == pytest.approx(exact[key], rel=0.05), key
