"""Memory of the reward's geometry, and of an LGM's training, at full shape, counted under fake tensors: nothing is
allocated."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from vggrpo.config import load_config
from vggrpo.config_lgm import load_lgm_config

FILE = Path(__file__).parents[2] / "benchmarks" / "full_shape.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("full_shape", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.e2e
@pytest.mark.parametrize("recipe", ["wan2.1-t2v-1.3b", "wan2.1-t2v-1.3b-1gpu-24gb", "wan2.2-ti2v-5b"])
def test_the_doctor_estimates_what_reading_geometry_holds(benchmark, recipe):
    counted = benchmark.account_geometry(load_config(recipe))
    assert counted["doctor_geometry_gib"] == pytest.approx(counted["geometry_gib"], rel=0.05)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        ("lgm-wan2.1-any4d", "distill.micro_batch=1"),
        ("lgm-wan2.1-any4d", "distill.micro_batch=2"),
        ("lgm-wan2.2-any4d", "distill.micro_batch=1"),
        ("lgm-wan2.1-any4d", "distill.gradient_checkpointing=false"),
        ("lgm-wan2.2-any4d", "distill={gradient_checkpointing: false, micro_batch: 1, bf16: false}"),
    ],
)
def test_the_doctor_estimates_what_training_an_lgm_holds(benchmark, recipe, override):
    counted = benchmark.account_lgm(load_lgm_config(recipe, [override]))
    assert counted["doctor_distill_gib"] == pytest.approx(counted["distill_gib"], rel=0.05)
