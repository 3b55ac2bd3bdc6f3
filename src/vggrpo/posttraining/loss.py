"""The clipped policy-gradient loss and the Gaussian KL of GRPO (METHOD section 3).

J = mean min(rho A, clip(rho, 1-e, 1+e) A) - beta KL,    rho = exp(log p_new - log p_old)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class PolicyLoss(NamedTuple):
    """Loss per transition, the probability ratio, and where the clip acts (both without gradient)."""

    per_sample: Float[Tensor, " N"]
    ratio: Float[Tensor, " N"]
    clipped: Bool[Tensor, " N"]

    @property
    def loss(self) -> Float[Tensor, ""]:
        """Mean over the transitions."""
        return self.per_sample.mean()


def clipped_policy_loss(
    log_prob: Float[Tensor, " N"],
    old_log_prob: Float[Tensor, " N"],
    advantage: Float[Tensor, " N"],
    *,
    clip: float = 1e-3,
    advantage_clip: float | None = 5.0,
    mean_shift: Float[Tensor, " N"] | None = None,
    std: Float[Tensor, " N"] | float = 1.0,
    step_length: Float[Tensor, " N"] | float = 1.0,
) -> PolicyLoss:
    """`-min(rho A, clip(rho, 1-e, 1+e) A)` per transition.

    Args:
        log_prob: of the step under the policy now, with gradient.
        old_log_prob: of the step under the policy that took it.
        advantage: of the sample.
        clip: e. Small, because the log-probabilities are means over many dimensions.
        advantage_clip: bound on |A| before all else, None = none.
        mean_shift: None, or `mean |mu - mu_old|^2 / (2 std^2)` of each transition, with gradient: the ratio is then
            GRPO-Guard's `exp((log p - log p_old + mean_shift) std)` and the loss is divided by `step_length`. Without
            the shift the log-ratio is negative on average, and its spread grows as the step's noise shrinks; with it,
            the log-ratio is `mean eps (mu - mu_old)`, so one clip fits all steps.
        std: of the step's Gaussian.
        step_length: -dt of the step.
    """
    if advantage_clip is not None:
        advantage = advantage.clamp(-advantage_clip, advantage_clip)
    log_ratio = log_prob - old_log_prob
    if mean_shift is not None:
        log_ratio, advantage = (log_ratio + mean_shift) * std, advantage / step_length
    ratio = torch.exp(log_ratio)
    plain, bounded = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    detached = ratio.detach()
    return PolicyLoss(torch.maximum(plain, bounded), detached, (bounded > plain).detach())


def gaussian_kl(
    mean: Float[Tensor, "N ..."],
    reference_mean: Float[Tensor, "N ..."],
    std: Float[Tensor, ...],
    *,
    mask: Bool[Tensor, ...] | None = None,
) -> Float[Tensor, " N"]:
    """KL of two Gaussians with the same std, per dimension: mean over the non-batch dims of `(mu - mu_ref)^2 / (2
    std^2)`.

    Args:
        mean: of the policy's step, with gradient.
        reference_mean: of the reference's step.
        std: of the step (`s sqrt(-dt)`), broadcastable. Passing the diffusion coefficient `s` instead gives flow_grpo's
            unit.
        mask: True where the policy acts; the mean is over those dims.
    """
    divergence = (mean - reference_mean) ** 2 / (2 * std**2)
    if mask is None:
        return divergence.flatten(1).mean(dim=1)
    acts = mask.to(mean.device).expand_as(mean)
    return torch.where(acts, divergence, 0.0).flatten(1).sum(dim=1) / acts.flatten(1).sum(dim=1).clamp_min(1)
