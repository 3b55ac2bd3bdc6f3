"""Memory of the reward's geometry at full shape, counted under fake tensors: nothing is allocated."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from vggrpo.config import load_config

FILE = Path(__file__).parents[2] / "benchmarks" / "full_shape.py"


@pytest.mark.e2e
@pytest.mark.parametrize("recipe", ["wan2.1-t2v-1.3b", "wan2.1-t2v-1.3b-1gpu-24gb", "wan2.2-ti2v-5b"])
def test_the_doctor_estimates_what_reading_geometry_holds(recipe):
    spec = importlib.util.spec_from_file_location("full_shape", FILE)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    counted = benchmark.account_geometry(load_config(recipe))
    assert counted["doctor_geometry_gib"] == pytest.approx(counted["geometry_gib"], rel=0.05)
