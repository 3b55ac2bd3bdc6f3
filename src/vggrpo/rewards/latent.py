"""The plug for other trainers: latents in, rewards out, one import and no config.

reward = LatentGeometryReward.from_pretrained("path/to/lgm")
scores = reward(latents)          # {"motion": (B,), "geometry": (B,), "valid": (B,), ...}

`WeightedLatentReward` makes one number of any rewards, for guidance and for choosing among candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction
from vggrpo.lgm.model import LatentGeometryModel
from vggrpo.rewards.base import RewardContext
from vggrpo.rewards.registry import AUDITED, check_all_options, get_reward


class LatentGeometryReward(nn.Module):
    """Camera smoothness and reprojection consistency of latents.

    Args:
        lgm: the latent geometry model.
        chunk: clips that go through the LGM at once; halved, for good, whenever a CUDA device runs out of memory.
        differentiable: keep the graph from rewards to latents (for guidance and direct training).
        options: keyword arguments of `camera_motion_smoothness` and `geometry_reprojection_consistency` by these names,
            such as a recipe has them (`vggrpo.rewards.registry.audited_options`); None: their defaults.

    Raises:
        UserError: options of another reward, or that the reward does not have; `chunk` is less than 1.
    """

    def __init__(
        self,
        lgm: LatentGeometryModel,
        chunk: int = 16,
        differentiable: bool = False,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        _check_chunk(chunk)
        check_all_options(options or {}, AUDITED)
        self.lgm, self.chunk, self.differentiable = lgm, chunk, differentiable
        self.options = {name: dict((options or {}).get(name, {})) for name in AUDITED}

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        chunk: int = 16,
        differentiable: bool = False,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> LatentGeometryReward:
        """Load the LGM from a directory, or "embedded" for the shipped one; see the class for the arguments.

        Errors are also those of `LatentGeometryModel.from_pretrained`.
        """
        check_all_options(options or {}, AUDITED)  # before a large model is loaded
        return cls(LatentGeometryModel.from_pretrained(directory), chunk, differentiable, options=options)

    def forward(self, latents: Float[Tensor, "B C T H W"]) -> dict[str, Float[Tensor, " B"]]:
        """`motion` and `geometry` rewards in [0, 1], `valid` (bool), all terms (`e_trans`, `e_rot`, `e_geo`, ...).

        Raises:
            UserError: no clips, or latents that the LGM refuses.
        """
        _check_not_empty(latents)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            while True:
                try:
                    parts = [self._score(piece) for piece in latents.split(self.chunk)]
                    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                except torch.cuda.OutOfMemoryError:
                    if min(self.chunk, len(latents)) == 1:
                        raise
                # Outside of the handler, which would keep the failed call's tensors alive.
                self.chunk = max(1, min(self.chunk, len(latents)) // 2)
                torch.cuda.empty_cache()

    def _score(self, latents: Tensor) -> dict[str, Tensor]:
        prediction = self.lgm(latents)
        motion, geometry = (get_reward(name)(prediction, **self.options[name]) for name in AUDITED)
        return {
            "motion": motion.value,
            "geometry": geometry.value,
            "valid": motion.valid & geometry.valid,
            **motion.terms,
            **geometry.terms,
        }


class WeightedLatentReward:
    """The weighted mean of rewards read from latents, differentiable in them.

    Args:
        lgm: latents -> geometry, such as a `LatentGeometryModel`.
        weights: reward -> weight, at least one of them positive.
        options: reward -> its keyword arguments.
        chunk: clips that go through the LGM at once.

    Raises:
        UserError: for an unknown reward or option, weights that are negative or all zero, or a `chunk`
            of less than 1.
    """

    def __init__(
        self,
        lgm: Callable[[Tensor], GeometryPrediction],
        weights: Mapping[str, float],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        chunk: int = 16,
    ) -> None:
        if min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
            raise UserError(f"the weights of the rewards are {dict(weights)}; give at least one that is positive")
        _check_chunk(chunk)
        check_all_options(options or {}, weights)
        total = sum(weights.values())
        self._terms = [(get_reward(name), weight / total, dict((options or {}).get(name, {})))
                       for name, weight in weights.items() if weight > 0]  # fmt: skip
        self._lgm, self._chunk = lgm, chunk

    def __call__(self, latents: Float[Tensor, "B C T H W"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """One number a clip; NaN, without gradient, where any of the rewards cannot be computed.

        Raises:
            UserError: no clips, or latents that the LGM refuses.
        """
        _check_not_empty(latents)
        parts = []
        for start in range(0, len(latents), self._chunk):
            piece = slice(start, start + self._chunk)
            prediction, context = self._lgm(latents[piece]), RewardContext(list(prompts[piece]))
            values = [weight * reward(prediction, context=context, **options).value
                      for reward, weight, options in self._terms]  # fmt: skip
            total = torch.stack(values).sum(0)
            parts.append(torch.where(total.isfinite(), total, torch.full_like(total, torch.nan)))
        return torch.cat(parts)


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise UserError(f"chunk is {chunk}; give the number of clips that go through the LGM at once, 1 or more")


def _check_not_empty(latents: Tensor) -> None:
    if not latents.numel():
        raise UserError(f"there is nothing to score in latents of shape {tuple(latents.shape)}; give one clip or more")
