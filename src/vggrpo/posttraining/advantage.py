"""Advantages of a group: each reward normalised by itself, then averaged (VGGRPO's equation, METHOD section 3).

    A_k = sum_r w_r (r_k - mean_group(r)) / (std(r) + eps) / sum_r w_r

`mode="sum"` is what most public trainers do instead: the rewards' mean first, then one normalisation; it lets the
reward with the larger
spread decide. A group without spread gives exactly zero, never noise over `eps`.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_advantages(
    rewards: Float[Tensor, "R N"],
    group: Int[Tensor, " N"],
    *,
    weights: Float[Tensor, " R"] | None = None,
    mode: Literal["decoupled", "sum"] = "decoupled",
    std: Literal["population", "sample"] = "population",
    std_scope: Literal["group", "global"] = "group",
    eps: float = 1e-4,
    clip: float | None = None,
    valid: Bool[Tensor, "R N"] | None = None,
    invalid: Literal["worst", "drop"] = "worst",
    asked: Bool[Tensor, "R N"] | None = None,
) -> Float[Tensor, " N"]:
    """Advantage of each sample within its group.

    Args:
        rewards: R rewards of N samples, higher is better.
        group: which group (prompt) each sample belongs to.
        weights: of the rewards, >= 0 with a positive sum; None = equal. Only their proportions matter.
        mode: "decoupled" normalises each reward by itself; "sum" normalises the weighted mean of the rewards.
        std: divide by the population's or the sample's (N - 1) standard deviation.
        std_scope: of the group, or of all samples (the mean is the group's in both cases).
        eps: added to the standard deviation, in units of the reward.
        clip: bound on |A|, None = none.
        valid: False where a reward could not be computed; such values have no part in mean and deviation. NaN and
            infinity are invalid anyway.
        invalid: "worst" gives such a sample the group's lowest valid advantage in that reward; "drop" gives it 0 as a
            whole.
        asked: where a reward has a say; elsewhere it neither counts nor makes a sample invalid. None: `asked_rewards`.

    Returns:
        (N,) advantages; exactly 0 where a group has no spread.
    """
    values = torch.atleast_2d(rewards).double()
    ok = torch.isfinite(values) if valid is None else torch.isfinite(values) & torch.atleast_2d(valid)
    weight = values.new_ones(len(values)) if weights is None else weights.to(values)
    if weight.shape != (len(values),) or bool((weight < 0).any()) or not float(weight.sum()) > 0:
        raise ValueError(f"expected {len(values)} weights >= 0 with a positive sum, got {weight.tolist()}")
    weight = weight / weight.sum()
    values = torch.where(ok, values, 0.0)
    asked = asked_rewards(ok, group, weight) if asked is None else asked
    judged = judged_samples(ok, asked)
    if mode == "sum":
        share = weight[:, None] * asked
        mean = (share * values).sum(dim=0) / torch.where(asked.any(dim=0), share.sum(dim=0), 1.0)
        values, ok, asked, weight = mean[None], judged[None], judged.new_ones(1, len(judged)), weight.new_ones(1)
    index = torch.unique(group, return_inverse=True)[1]
    normalised = torch.stack([_normalise(v, o, index, std, std_scope, eps) for v, o in zip(values, ok, strict=True)])
    if invalid == "worst":
        filled = [_fill_with_worst(a, o, index) for a, o in zip(normalised, ok, strict=True)]
        normalised = torch.where(asked, torch.stack(filled), normalised)
        advantages = (weight[:, None] * normalised).sum(dim=0)
    else:
        advantages = torch.where(judged, (weight[:, None] * normalised).sum(dim=0), 0.0)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return advantages.to(rewards.dtype)


def asked_rewards(
    valid: Bool[Tensor, "R N"], group: Int[Tensor, " N"], weights: Float[Tensor, " R"]
) -> Bool[Tensor, "R N"]:
    """Where a reward has a say: its weight is positive, and it could be computed for some sample of the group.

    One that could not does not apply there (a camera's adherence to a prompt that names no move): it tells the group's
    samples apart no more than a reward of weight 0, and must not take the others' say from them.
    """
    index = torch.unique(group, return_inverse=True)[1]
    per_group = torch.stack([_group_sum(row.double(), index, int(index.max()) + 1) for row in valid])
    return (per_group > 0)[:, index] & (weights > 0).to(valid.device)[:, None]


def judged_samples(valid: Bool[Tensor, "R N"], asked: Bool[Tensor, "R N"]) -> Bool[Tensor, " N"]:
    """Samples for which every reward that has a say (`asked_rewards`; at least one) could be computed."""
    return (valid | ~asked).all(dim=0) & asked.any(dim=0)


def _normalise(values: Tensor, ok: Tensor, index: Tensor, std: str, scope: str, eps: float) -> Float[Tensor, " N"]:
    """(r - group mean) / (std + eps) over the valid samples, 0 elsewhere."""
    groups = int(index.max()) + 1
    mean = _group_sum(values * ok, index, groups) / _group_sum(ok.to(values), index, groups).clamp_min(1)
    centred = torch.where(ok, values - mean[index], 0.0)
    # Rounding of the mean must not count as spread: equal rewards have none.
    centred = torch.where(centred.abs() > 1e-12 * values.abs().max().clamp_min(1e-300), centred, 0.0)
    if scope == "group":
        square = _group_sum(centred**2, index, groups)
        count = _group_sum(ok.to(values), index, groups)
        deviation = (square / (count - int(std == "sample")).clamp_min(1)).sqrt()[index]
    else:
        count = ok.sum().to(values)
        overall = torch.where(ok, values - (values * ok).sum() / count.clamp_min(1), 0.0)
        deviation = ((overall**2).sum() / (count - int(std == "sample")).clamp_min(1)).sqrt()
    return centred / (deviation + eps)


def _fill_with_worst(advantages: Tensor, ok: Tensor, index: Tensor) -> Float[Tensor, " N"]:
    """Invalid samples get the lowest advantage of their group's valid samples (0 if there is none)."""
    groups = int(index.max()) + 1
    worst = advantages.new_full((groups,), float("inf")).scatter_reduce(
        0, index, torch.where(ok, advantages, float("inf")), reduce="amin"
    )
    worst = torch.where(torch.isfinite(worst), worst, 0.0)
    return torch.where(ok, advantages, worst[index])


def _group_sum(values: Tensor, index: Tensor, groups: int) -> Float[Tensor, " G"]:
    return values.new_zeros(groups).index_add(0, index, values)
