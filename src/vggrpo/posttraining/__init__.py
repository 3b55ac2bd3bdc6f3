"""Post-training: one algorithm a file, and the trainer they share. Imported lazily."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "clipped_policy_loss": "loss",
    "gaussian_kl": "loss",
    "group_advantages": "advantage",
    "train": "trainer",
}

__all__ = ["clipped_policy_loss", "gaussian_kl", "group_advantages", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
