"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Several workers share the cores: each computes with its part of them, but for what it starts as processes."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among workers a file stays together, because its fixtures are costly, and so do all whole commands from
    outside, because they measure time and use all cores."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = "e2e" if item.path.parent.name == "e2e" else item.path.name
            item.add_marker(pytest.mark.xdist_group(group))


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
