"""The benchmarks of training: memory account against the doctor's formula, one update in small, and how the peer's loop
is found in its source."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from vggrpo.config import load_config
from vggrpo.errors import UserError
from vggrpo.models.any4d import Any4D, Any4DConfig
from vggrpo.models.dinov2 import DinoConfig
from vggrpo.models.memory import SHAPES, TransformerShape

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark():
    return load("full_shape")


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (FOLDER.parent / "configs").glob("wan*.yaml")))
def test_the_doctor_estimates_what_an_update_holds(benchmark, recipe):
    """At full shape, under fake tensors: nothing is allocated."""
    counted = benchmark.account(load_config(recipe))
    assert counted["formula_values"] == pytest.approx(counted["values_a_token_and_block"], rel=0.05)
    assert counted["doctor_gib"] == pytest.approx(counted["activations_gib"], rel=0.1)
    assert counted["doctor_rollout_gib"] == pytest.approx(counted["rollout_gib"], rel=0.05)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1.42e9),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14.29e9),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 5.0e9),
    ],
)
def test_shapes_have_the_published_number_of_parameters(benchmark, name, parameters):
    with torch.device("meta"):
        one, two = (benchmark.build_transformer(SHAPES[name], torch.bfloat16, layers) for layers in (1, 2))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (one, two)]
    total = sizes[0] + (SHAPES[name].layers - 1) * (sizes[1] - sizes[0])
    assert total == pytest.approx(parameters, rel=0.01)


def test_one_update_in_small(benchmark, monkeypatch):
    """The script that is for a GPU, on the CPU: two blocks of two heads, 9 frames."""
    monkeypatch.setattr(benchmark, "_shape", lambda config: TransformerShape(256, 128, 2))
    config = load_config(
        "wan2.1-t2v-1.3b",
        ["data.num_frames=9", "data.height=32", "data.width=32", "grpo.samples_per_prompt=4", "lgm.path=nowhere",
         "sampling.num_steps=3", "sampling.window=1", "model.device=cpu", "grpo.micro_batch=4"],
    )  # fmt: skip
    result = benchmark.measure(config)
    assert (
        result["geometry_reader"] == "maps without a network"
        and 0 < result["reward_share"] < 1
        and result["grad_norm"] > 0
    )
    assert result["seconds/rollout"] > 0 and result["seconds/replay"] > 0 and result["videos"] == 4


@pytest.mark.parametrize(("stride", "channels"), [(8, 16), (16, 48)])
def test_a_random_geometry_network_is_run_and_not_listened_to(benchmark, stride, channels):
    encoder = DinoConfig(dim=32, depth=3, heads=4, position_grid=5)
    sizes = {"dim": 48, "heads": 4, "layers": 6, "hooks": (2, 3), "widths": (8, 12, 16, 20), "features": 16}
    geometry = Any4D(Any4DConfig(encoder=encoder, scale_hidden=12, **sizes)).eval()
    calls = []
    geometry.register_forward_hook(lambda *_: calls.append("RGB"))
    resume = geometry.resume_raw
    geometry.resume_raw = lambda *arguments: calls.append("latents") or resume(*arguments)
    maps = object()
    read = benchmark.random_reader(geometry, TransformerShape(256, 128, 2, spatial_stride=stride), lambda latents: maps)
    assert read(torch.randn(1, channels, 3, 32 // stride, 32 // stride)) is maps
    assert calls == ["latents"]


def test_linearity(benchmark):
    assert benchmark._line([1.0, 3.0, 5.0]) == (pytest.approx([1.0, 3.0, 5.0]), pytest.approx(1))
    assert benchmark._line([1.0, 1.0, 4.0])[1] == pytest.approx(0.75)


def test_the_peers_loop_is_compiled_from_its_source(tmp_path):
    peer = load("against_flow_grpo")
    source = """
def compute_log_prob(j):
    return j + 1

def main(_):
    for epoch in range(2):
        for j in tqdm(train_timesteps, desc="Timestep"):
            with accelerator.accumulate(None):
                accelerator.backward(compute_log_prob(j) * weight)
                optimizer.step()
"""
    file = tmp_path / "train.py"
    file.write_text(source)
    namespace, loop = peer._training_loop(file)
    weight = torch.zeros((), requires_grad=True)
    meter = peer.Meter()
    accelerator = peer._Accelerator(3, [weight], meter)
    optimizer = peer._Every(3, torch.optim.SGD([weight], lr=1.0), meter)
    exec(loop, namespace | {"train_timesteps": range(3), "accelerator": accelerator, "optimizer": optimizer,
                            "weight": weight})  # fmt: skip
    assert float(weight) == pytest.approx(-(1 + 2 + 3) / 3)  # one step, of the mean over the accumulated losses
    assert meter.take()["optimizer"] > 0 and meter.take()["optimizer"] == 0
    file.write_text(source.replace("train_timesteps", "others"))
    with pytest.raises(UserError, match="another version"):
        peer._training_loop(file)
    with pytest.raises(UserError, match="checkout"):
        peer._training_loop(tmp_path / "absent.py")


def test_the_peers_optimizer_is_no_part_of_its_replay():
    """Over several updates, too: a clock that counts its readings."""
    peer = load("against_flow_grpo")
    theirs = peer.Theirs.__new__(peer.Theirs)
    theirs.meter = peer.Meter()
    theirs.meter.clock = iter(range(1000)).__next__
    theirs.roll_out = lambda number: {}

    def replay(sample, advantages):
        with theirs.meter.stage("optimizer"):
            pass

    theirs.replay = replay
    for number in range(3):
        theirs.update(number, lambda sample: None)
    assert theirs.meter.take() == {"roll-out": 3, "replay": 6, "optimizer": 3}


def test_time_to_a_reward_stops_at_the_goal_and_counts_the_trainers_work_alone():
    script = load("time_to_reward")

    class Side:
        def __init__(self):
            self.level, self.calls, self.meter = 0.0, [], script.PEER.Meter()

        def clips(self, kept):
            return kept

        def update(self, number, advantages_of):
            self.calls.append(number)
            clips = torch.linspace(-1, 1, 4).view(4, 1, 1, 1, 1).expand(4, 2, 1, 1, 1) + self.level
            advantages = advantages_of(clips)
            assert advantages.mean().abs() < 1e-6 and advantages[3] > 1
            with self.meter.stage("replay"):
                self.level += 1.0

    side = Side()
    result = script.train(side, lambda side: torch.full((3,), side.level), goal=3.0, updates=10, seed=2)
    assert side.calls == [20_000 + number for number in range(3)]  # no noise of another seed
    assert result["reached"] and result["updates"] == 3 and result["held_out"] == [1.0, 2.0, 3.0]
    assert result["seconds"] == pytest.approx(result["replay"]) and result["replay"] > 0
    assert not script.train(Side(), lambda side: torch.zeros(3), goal=3.0, updates=2, seed=0)["reached"]


def test_held_out_clips_are_the_deterministic_ones_of_fixed_seeds():
    script = load("time_to_reward")
    sigmas = torch.linspace(1, 0, 5)

    def straight(x, t, text):  # towards clips whose first channel is 2
        return (x - 2.0) / t.view(-1, 1, 1, 1, 1)

    rewards = script.held_out(straight, torch.zeros(1, 3, 2), sigmas, (2, 1, 2, 2))
    torch.testing.assert_close(rewards, torch.full((script.HELD_OUT,), 2.0))
