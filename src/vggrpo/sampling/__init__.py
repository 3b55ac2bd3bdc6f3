"""Sampling of rectified flows: the stochastic step, roll-outs of the policy, and videos to look at."""

from __future__ import annotations

from typing import Any

from vggrpo.sampling.flow_sde import SDEStep, ode_step, sde_step
from vggrpo.sampling.guidance import RewardGuidance
from vggrpo.sampling.rollout import NoiseSettings, Trajectory, choose_window, guided_velocity, ode_sample, rollout
from vggrpo.sampling.seeds import derive_seed, seeded_noise

__all__ = [
    "NoiseSettings",
    "RewardGuidance",
    "SDEStep",
    "Trajectory",
    "choose_window",
    "derive_seed",
    "generate_videos",
    "guided_velocity",
    "ode_sample",
    "ode_step",
    "rollout",
    "sde_step",
    "seeded_noise",
]


def __getattr__(name: str) -> Any:
    """`generate_videos` needs diffusers and PyAV, which a foreign trainer that only wants `sde_step` need not have."""
    if name != "generate_videos":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vggrpo.sampling.generate import generate_videos

    return generate_videos
