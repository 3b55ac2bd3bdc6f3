"""From clean latents to rewards: the LGM's geometry, every configured reward, and what is watched beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vggrpo.config import RewardTerm
from vggrpo.geometry import GeometryPrediction
from vggrpo.posttraining.watch import BaseMotion, reward_context
from vggrpo.rewards import RewardContext, camera_travel, get_reward, subject_share
from vggrpo.rewards.registry import check_options

GeometryReader = Callable[[Float[Tensor, "B C T H W"]], GeometryPrediction]


@dataclass(frozen=True)
class Scores:
    """Rewards of N clips.

    Attributes:
        values: (R, N), NaN where invalid.
        valid: (R, N).
        watched: quantities (N,) that are logged, NaN where unknown: `camera_travel`, `dynamic_share`, `subject_share`,
            and the rewards' own terms.
    """

    values: Float[Tensor, "R N"]
    valid: Bool[Tensor, "R N"]
    watched: dict[str, Float[Tensor, " N"]]


def check_rewards(terms: Mapping[str, RewardTerm]) -> None:
    """Raise a UserError that names the nearest known reward, or option, for an unknown one."""
    for name, term in terms.items():
        check_options(name, term.options)


def reward_weights(terms: Mapping[str, RewardTerm]) -> Float[Tensor, " R"]:
    """The configured rewards' weights, in their order."""
    return torch.tensor([term.weight for term in terms.values()])


@torch.no_grad()
def score_latents(
    lgm: GeometryReader,
    latents: Float[Tensor, "N C T H W"],
    terms: Mapping[str, RewardTerm],
    *,
    prompts: Sequence[str],
    base: Mapping[str, BaseMotion],
    micro_batch: int,
) -> Scores:
    """All rewards of N clips, `micro_batch` at a time.

    Args:
        lgm: latents -> geometry.
        latents: clean, normalised.
        terms: the configured rewards.
        prompts: one a clip.
        base: what the base model shows by prompt; empty if it is not measured.
        micro_batch: clips per call.
    """
    parts = [
        _score_chunk(lgm, chunk, terms, reward_context(prompts[i * micro_batch : i * micro_batch + len(chunk)], base))
        for i, chunk in enumerate(latents.split(micro_batch))
    ]
    return Scores(
        torch.cat([part.values for part in parts], dim=1),
        torch.cat([part.valid for part in parts], dim=1),
        {name: torch.cat([part.watched[name] for part in parts]) for name in parts[0].watched},
    )


@torch.no_grad()
def measure_motion(lgm: GeometryReader, latents: Float[Tensor, "N C T H W"], micro_batch: int) -> Float[Tensor, "3 N"]:
    """Camera travel, shares of moving and of subject pixels of each clip, NaN where its geometry is broken or does not
    tell."""
    return torch.cat([torch.stack(_motion(lgm(chunk))) for chunk in latents.split(micro_batch)], dim=1)


def _motion(prediction: GeometryPrediction) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    travel = camera_travel(prediction)
    moving = prediction.dynamic_mask
    share = torch.full_like(travel, torch.nan) if moving is None else moving.flatten(1).to(travel).mean(dim=1)
    return travel, share, subject_share(prediction)


def _score_chunk(
    lgm: GeometryReader, latents: Tensor, terms: Mapping[str, RewardTerm], context: RewardContext
) -> Scores:
    prediction = lgm(latents)
    watched = dict(zip(("camera_travel", "dynamic_share", "subject_share"), _motion(prediction), strict=True))
    values, valid = [], []
    for name, term in terms.items():
        reward = get_reward(name)(prediction, context=context, **term.options)
        values.append(reward.value.float())
        valid.append(reward.valid & reward.value.isfinite())
        watched |= {f"{name}/{key}": value.float() for key, value in reward.terms.items() if value.ndim == 1}
    return Scores(torch.stack(values), torch.stack(valid), watched)
