"""Sampling of rectified flows: the stochastic step, roll-outs of the policy, and videos to look at. Imported lazily."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "NoiseSettings": "rollout",
    "SDEStep": "flow_sde",
    "Trajectory": "rollout",
    "choose_window": "rollout",
    "derive_seed": "seeds",
    "generate_videos": "generate",
    "guided_velocity": "rollout",
    "ode_sample": "rollout",
    "ode_step": "flow_sde",
    "rollout": "rollout",
    "sde_step": "flow_sde",
    "seeded_noise": "seeds",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
