"""What all rewards share: their result, their context, and how a prediction is made safe to compute with.

Every reward is computed in float32 (float64 stays float64) outside of autocast, whatever the prediction's dtype. A
clip that cannot be judged has `valid` False and NaN as its value and terms, and sends no gradient: it is never a
number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction


@dataclass
class Reward:
    """One reward of B clips.

    Attributes:
        value: higher is better; NaN where invalid. Differentiable in the prediction.
        terms: what the value is made of and what to watch beside it, (B,) each, NaN where invalid; for logs.
        valid: whether the clip could be judged.
    """

    value: Float[Tensor, " B"]
    terms: dict[str, Tensor]
    valid: Bool[Tensor, " B"]


PerClip: TypeAlias = Float[Tensor, " B"] | Mapping[str, float]


@dataclass(frozen=True)
class RewardContext:
    """What a reward may need beside geometry.

    Attributes:
        prompts: one a clip.
        base_travel: `camera_travel` of the untouched base model: either one number a clip, (B,), or a mapping from
            prompt to number, looked up through `prompts`.
        base_subjects: its `subject_share`, likewise.
    """

    prompts: tuple[str, ...] | list[str] = ()
    base_travel: PerClip = field(default_factory=dict)
    base_subjects: PerClip = field(default_factory=dict)

    def base_travel_of(self, like: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The base model's travel of each clip, on the device and in the dtype of `like` (B,)."""
        return self._of_clips("base_travel", like)

    def base_subjects_of(self, like: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The base model's share of subject pixels of each clip, likewise."""
        return self._of_clips("base_subjects", like)

    def _of_clips(self, name: str, like: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        known: PerClip = getattr(self, name)
        if not isinstance(known, Tensor):
            unknown = sorted(set(self.prompts) - set(known))
            if unknown:
                raise UserError(f"{name} lacks {unknown[0]!r}: measure the base model on every prompt first")
            known = torch.tensor([known[prompt] for prompt in self.prompts])
        if known.shape != like.shape:
            raise UserError(
                f"{name}: expected one number a clip, {tuple(like.shape)}, got {tuple(known.shape)}; "
                "give the context one prompt (or one number) a clip"
            )
        return known.to(like)


RewardFunction = Callable[..., Reward]


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: runs a function of a prediction in at least float32 and outside of autocast."""

    @functools.wraps(function)
    def wrapper(prediction: GeometryPrediction, **options: Any) -> Any:
        if prediction.depth.dtype != torch.float64:
            prediction = prediction.to(dtype=torch.float32)
        with torch.autocast(prediction.depth.device.type, enabled=False):
            return function(prediction, **options)

    return wrapper


def usable_pixels(prediction: GeometryPrediction, threshold: float = 0.0) -> Bool[Tensor, "B S H W"]:
    """Pixels with a positive depth and a confidence above zero and at least `threshold`."""
    return (prediction.conf > 0) & (prediction.conf >= threshold) & (prediction.depth > 0)


def finite_clips(prediction: GeometryPrediction) -> Bool[Tensor, " B"]:
    """Clips whose cameras are finite, and depth, points and confidence too wherever the confidence is not zero."""
    cameras = prediction.cam2world.isfinite().flatten(1).all(1) & prediction.intrinsics.isfinite().flatten(1).all(1)
    maps = prediction.depth.isfinite() & prediction.points.isfinite().all(-1) & prediction.conf.isfinite()
    return cameras & (maps | (prediction.conf == 0)).flatten(1).all(1)


def median_depth(depth: Float[Tensor, "B S H W"], mask: Bool[Tensor, "B S H W"]) -> Float[Tensor, " B"]:
    """Median depth of each clip's masked pixels, the unit in which lengths are measured; 1 for a clip that has none."""
    kept = torch.where(mask, depth, torch.full_like(depth, torch.nan)).flatten(1)
    kept = torch.where(mask.flatten(1).any(1, keepdim=True), kept, torch.ones_like(kept))
    return kept.nanmedian(1).values


def hinge_below_base(
    amount: Float[Tensor, " B"], base: Float[Tensor, " B"], keep: float, nothing: float
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Penalty ``-max(0, keep - amount / base)`` for showing less than the base model, and the ratio; 0 and 1 where the
    base model shows at most `nothing`."""
    asked = base > nothing
    ratio = torch.where(asked, amount / torch.where(asked, base, 1.0), 1.0)
    return -torch.where(asked, (keep - ratio).clamp_min(0), 0.0), ratio


def judged(value: Tensor, terms: dict[str, Tensor], valid: Bool[Tensor, " B"]) -> Reward:
    """A reward with NaN in place of every number of the clips that are not valid; terms are cut off from the graph."""

    def hide(number: Tensor) -> Tensor:
        keep = valid.view(-1, *[1] * (number.ndim - 1))
        return torch.where(keep, number, torch.full_like(number, torch.nan))

    return Reward(hide(value), {name: hide(term.detach()) for name, term in terms.items()}, valid)
