"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Several workers share the cores: each computes with its part of them, but for what it starts as processes."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_finish() -> None:
    """What the imports made stays to the end: no garbage collection need walk it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Among workers a file of small tests stays together, because its fixtures are costly; whole commands go one by one
    to whoever is free. (Marks of `xdist_group` would say the same, but xdist 3.8 loses them with pytest 9.2.)"""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return nodeid if "e2e" in file.split("/") else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real videos, latents, cameras and parity numbers beside a developer's checkout; tests skip without them."""
    directory = Path(__file__).resolve().parents[2] / "shared"
    if not directory.is_dir():
        pytest.skip("the folder of real data beside the checkout is absent")
    return directory


@pytest.fixture(scope="session")
def tiny_wan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `WanPipeline` directory with random weights and sizes unlike any shipped model's."""
    from tiny_wan import save_tiny_wan

    return save_tiny_wan(tmp_path_factory.mktemp("wan"))
