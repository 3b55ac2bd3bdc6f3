"""Losses of the forward process: flow matching, flow-DPO and DiffusionNFT. Velocities in, one loss a sample out.

    x_t = (1 - t) x0 + t eps      target v = eps - x0      err(u) = mean over the latents of (u - v)^2

All means are over the non-batch dimensions, so that nothing depends on the size of the video.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def noised(x0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], t: Float[Tensor, " B"]) -> Float[Tensor, "B ..."]:
    """``x_t = (1 - t) x0 + t eps``."""
    time = t.to(x0).view(-1, *[1] * (x0.ndim - 1))
    return (1 - time) * x0 + time * eps


def velocity_error(velocity: Float[Tensor, "B ..."], target: Float[Tensor, "B ..."]) -> Float[Tensor, " B"]:
    """``err``: mean squared distance of two velocities; with the target ``eps - x0`` this is flow matching's loss."""
    return (velocity - target).square().flatten(1).mean(1)


def flow_dpo_loss(
    winner: Float[Tensor, " B"],
    loser: Float[Tensor, " B"],
    winner_reference: Float[Tensor, " B"],
    loser_reference: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """``-log sigmoid( -beta/2 [ (err_w - err_w_ref) - (err_l - err_l_ref) ] )`` (Diffusion-DPO for velocities).

    Args:
        winner: the policy's velocity error on the better clip, with gradient.
        loser: on the worse clip, at the same time and with the same noise.
        winner_reference: the base model's error on the better clip.
        loser_reference: on the worse clip.
        beta: errors are means over the latents, so this is large.
    """
    margin = (winner - winner_reference) - (loser - loser_reference)
    return -functional.logsigmoid(-0.5 * beta * margin)


def nft_loss(
    velocity: Float[Tensor, "B ..."],
    old_velocity: Float[Tensor, "B ..."],
    target: Float[Tensor, "B ..."],
    optimality: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """``r err(v+) + (1 - r) err(v-)`` with ``v+ = (1 - beta) v_old + beta v`` and ``v- = (1 + beta) v_old - beta v``.

    Args:
        velocity: the policy's, with gradient.
        old_velocity: of the policy that made the clip, without gradient.
        target: ``eps - x0``.
        optimality: r in [0, 1]: how good the clip is; 1/2 says nothing.
        beta: distance of the implicit policies from the old one.
    """
    positive = (1 - beta) * old_velocity + beta * velocity
    negative = (1 + beta) * old_velocity - beta * velocity
    return optimality * velocity_error(positive, target) + (1 - optimality) * velocity_error(negative, target)


def optimality_of(advantage: Float[Tensor, " B"], clip: float) -> Float[Tensor, " B"]:
    """``r = 1/2 + 1/2 clamp(A / clip, -1, 1)``."""
    return 0.5 + 0.5 * (advantage / clip).clamp(-1, 1)


def drawn_times(count: int, sigmas: Float[Tensor, " S1"], generator: torch.Generator) -> Float[Tensor, " B"]:
    """Times drawn evenly from a fine schedule (1 to 0, the last left out), so that they follow the pipeline's shift."""
    return sigmas[torch.randint(len(sigmas) - 1, (count,), generator=generator)]
