"""What is watched beside the loss: rewards, their spread, and whether the videos stand still.

The cheapest consistent world is an empty, still one. So the camera's travel and the shares of moving and of subject
pixels are measured on the base model too, once per prompt and with the same sampler, and a run in which one of them
falls far below warns. A `StopRule` goes further and ends the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vggrpo.config_algorithms import StopConfig
from vggrpo.rewards import RewardContext

logger = logging.getLogger(__name__)
MEMORY = 10
"""Updates over which motion is averaged before it is judged."""


class BaseMotion(NamedTuple):
    """What the base model's videos of a prompt show: camera travel, shares of pixels that move and of subjects; NaN
    where it is not known."""

    travel: float = math.nan
    moving: float = math.nan
    subjects: float = math.nan

    @classmethod
    def mean(cls, several: Sequence[BaseMotion]) -> BaseMotion:
        """Mean of what is known of each."""
        return cls(*(mean_of(torch.tensor(values)) for values in zip(*several, strict=True)))


def base_motion_by(prompts: Iterable[str], rows: Iterable[Sequence[float]]) -> dict[str, BaseMotion]:
    """Base motion by prompt, from rows of (travel, moving, subjects), as measured or out of a checkpoint."""
    return dict(zip(prompts, map(BaseMotion._make, rows), strict=True))


def reward_context(prompts: Sequence[str], base: Mapping[str, BaseMotion]) -> RewardContext:
    """What rewards may ask about clips of these prompts."""
    return RewardContext(
        list(prompts),
        {prompt: motion.travel for prompt, motion in base.items()},
        {prompt: motion.subjects for prompt, motion in base.items()},
    )


class MotionWatch:
    """Motion of the policy's videos relative to the base model's, over the last updates.

    Args:
        floor: warn under this share of the base model's motion; 0 = never.
    """

    def __init__(self, floor: float) -> None:
        self.floor = floor
        self.base: dict[str, BaseMotion] = {}
        self.recent: list[list[float]] = []

    def metrics(
        self, prompts: Sequence[str], travel: float, moving: float, subjects: float, number: int
    ) -> dict[str, float]:
        """The log's numbers of one update, and the warning when it is due.

        Args:
            prompts: of the update.
            travel: mean camera travel of its videos.
            moving, subjects: mean shares of pixels that move and of subjects, NaN where the geometry model does not
                tell.
            number: of the update.
        """
        base = BaseMotion.mean([self.base.get(prompt, BaseMotion()) for prompt in prompts])
        ratios = [_ratio(now, before) for now, before in zip((travel, moving, subjects), base, strict=True)]
        self.recent = [*self.recent, ratios][-MEMORY:]
        if self.floor > 0 and len(self.recent) == MEMORY and (number + 1) % MEMORY == 0:
            for name, column in zip(
                ("camera travel", "share of moving pixels", "share of subject pixels"),
                zip(*self.recent, strict=True),
                strict=True,
            ):
                average = mean_of(torch.tensor(column))
                if average < self.floor:
                    logger.warning(
                        "the %s fell to %.0f %% of the base model's over the last %d updates: the videos empty or come "
                        "to a standstill; raise grpo.kl, or add the rewards camera_motion_hinge and "
                        "subject_presence_hinge",
                        name, 100 * average, MEMORY,
                    )  # fmt: skip
        return {
            "camera_travel_base": base.travel,
            "dynamic_share_base": base.moving,
            "subject_share_base": base.subjects,
            "camera_travel_ratio": ratios[0],
            "dynamic_share_ratio": ratios[1],
            "subject_share_ratio": ratios[2],
        }


class StopRule:
    """Whether a run should end now, by what its log says (`config.stop`).

    Args:
        settings: the thresholds.
        state: what `state` gave, of an earlier part of the run.
    """

    # the log's name of the quantity -> (field of the config, words, whether it must not fall; else not rise)
    WATCHED: ClassVar[dict[str, tuple[str, str, bool]]] = {
        "camera_travel_ratio": ("travel_below", "the camera travel relative to the base model", True),
        "dynamic_share_ratio": ("dynamics_below", "the share of moving pixels relative to the base model", True),
        "subject_share_ratio": ("subjects_below", "the share of subject pixels relative to the base model", True),
        "kl": ("kl_above", "the KL to the base model", False),
    }

    def __init__(self, settings: StopConfig, state: Mapping[str, Any] | None = None) -> None:
        self.settings = settings
        self.recent: dict[str, list[float]] = dict((state or {}).get("recent", {}))
        self.seconds: float = (state or {}).get("seconds", 0.0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold (JSON)."""
        return {"recent": self.recent, "seconds": self.seconds}

    def observe(self, metrics: Mapping[str, float], seconds: float) -> None:
        """Take in the log line of one update, which took so many seconds."""
        self.seconds += seconds
        for name, (field, _, _) in self.WATCHED.items():
            if name in metrics:
                self.recent[name] = [*self.recent.get(name, []), float(metrics[name])][-max(MEMORY, self._memory) :]
            elif getattr(self.settings, field) and name not in self.recent:
                logger.warning("stop.%s has no effect: this algorithm does not log %s", field, name)
                self.recent[name] = []

    def reason(self) -> str | None:
        """Why the run should end, None if it should go on."""
        for name, (field, words, floor) in self.WATCHED.items():
            limit, values = getattr(self.settings, field), self.recent.get(name, [])[-self._memory :]
            if not limit or len(values) < self._memory:
                continue
            average = mean_of(torch.tensor(values))
            if average < limit if floor else average > limit:
                side = "under" if floor else "above"
                return f"{words} is {average:.3g} on average over {self._memory} updates, {side} stop.{field} {limit:g}"
        limit = self.settings.seconds_above
        if limit is not None and self.seconds >= limit:
            return f"its updates took {self.seconds:.0f} s, and stop.seconds_above is {limit:g}"
        return None

    @property
    def _memory(self) -> int:
        return self.settings.memory


def reward_metrics(
    names: Sequence[str],
    values: Float[Tensor, "R N"],
    valid: Bool[Tensor, "R N"],
    group: Int[Tensor, " N"],
    watched: Mapping[str, Float[Tensor, " N"]],
) -> dict[str, float]:
    """Means of the rewards over valid samples, their spread within groups, and what is watched."""
    metrics: dict[str, float] = {}
    groups = int(group.max()) + 1
    for name, value, ok in zip(names, values, valid, strict=True):
        metrics[f"reward/{name}"] = mean_of(value[ok])
        spreads = [value[ok & (group == g)].std(correction=0) for g in range(groups) if bool((ok & (group == g)).any())]
        metrics[f"group_std/{name}"] = mean_of(torch.stack(spreads)) if spreads else math.nan
    metrics["samples/invalid"] = float((~valid.all(dim=0)).sum())
    return metrics | {name: mean_of(value) for name, value in watched.items()}


def mean_of(values: Tensor) -> float:
    """Mean of the finite values, NaN if there is none."""
    finite = values[torch.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _ratio(value: float, base: float) -> float:
    return value / base if math.isfinite(base) and base > 0 else math.nan
