"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


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
