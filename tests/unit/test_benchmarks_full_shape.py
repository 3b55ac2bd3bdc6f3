"""The benchmark at full shape: its memory account against the doctor's formula, and one whole update in small."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from vggrpo.config import load_config
from vggrpo.doctor import SHAPES, TransformerShape

FILE = Path(__file__).parents[2] / "benchmarks" / "full_shape.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("full_shape", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recipe", ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"])
def test_the_doctor_estimates_what_autograd_keeps(benchmark, recipe):
    """At full shape, under fake tensors: nothing is allocated."""
    counted = benchmark.account(load_config(recipe))
    assert counted["formula_values"] == pytest.approx(counted["values_a_token_and_block"], rel=0.05)
    assert counted["doctor_gib"] == pytest.approx(counted["activations_gib"], rel=0.1)


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
    assert result["reward_is_a_stand_in"] and 0 < result["reward_share"] < 1 and result["grad_norm"] > 0
    assert result["seconds/rollout"] > 0 and result["seconds/replay"] > 0 and result["videos"] == 4
