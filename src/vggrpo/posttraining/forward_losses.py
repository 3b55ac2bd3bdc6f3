"""Losses of the forward process: flow matching, flow-DPO and DiffusionNFT. Velocities in, one loss a sample out.

    x_t = (1 - t) x0 + t eps      target v = eps - x0      err(u) = mean over the latents of (u - v)^2

All means are over the non-batch dimensions, so that nothing depends on the size of the video. Where the first latent
frame is given (image to video), it is neither noised nor counted.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from vggrpo.sampling.first_frame import acted_frames, frame_times, pin_first_frame


def noised(x0: Float[Tensor, "B ..."], eps: Float[Tensor, "B ..."], t: Float[Tensor, " B"]) -> Float[Tensor, "B ..."]:
    """``x_t = (1 - t) x0 + t eps``."""
    time = t.to(x0).view(-1, *[1] * (x0.ndim - 1))
    return (1 - time) * x0 + time * eps


def network_input(
    x0: Float[Tensor, "B C T H W"], eps: Float[Tensor, "B C T H W"], t: Float[Tensor, " B"], *, pinned: bool
) -> tuple[Float[Tensor, "B C T H W"], Float[Tensor, "B ..."], Bool[Tensor, "1 1 T 1 1"] | None]:
    """State, time and mask of what is trained on at `t`.

    Args:
        x0: clean latents.
        eps: noise.
        t: one time a clip.
        pinned: the first latent frame is given: it stays clean at time 0, and the mask leaves it out.

    Returns:
        ``x_t``; the times, (B,) or pinned (B, T); where the loss counts, None: everywhere.
    """
    state = noised(x0, eps, t)
    if not pinned:
        return state, t, None
    frames = x0.shape[2]
    return pin_first_frame(state, x0[:, :, :1]), frame_times(t, frames), acted_frames(frames, x0.device)


def velocity_error(
    velocity: Float[Tensor, "B ..."], target: Float[Tensor, "B ..."], mask: Bool[Tensor, ...] | None = None
) -> Float[Tensor, " B"]:
    """``err``: mean squared distance of two velocities; with the target ``eps - x0`` this is flow matching's loss.

    `mask`: True where it counts, broadcastable to the velocity; None: everywhere.
    """
    squared = (velocity - target).square()
    if mask is None:
        return squared.flatten(1).mean(1)
    counts = mask.expand_as(squared)
    return torch.where(counts, squared, torch.zeros_like(squared)).flatten(1).sum(1) / counts.flatten(1).sum(1)


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
    mask: Bool[Tensor, ...] | None = None,
) -> Float[Tensor, " B"]:
    """``r err(v+) + (1 - r) err(v-)`` with ``v+ = (1 - beta) v_old + beta v`` and ``v- = (1 + beta) v_old - beta v``.

    Args:
        velocity: the policy's, with gradient.
        old_velocity: of the policy that made the clip, without gradient.
        target: ``eps - x0``.
        optimality: r in [0, 1]: how good the clip is; 1/2 says nothing.
        beta: distance of the implicit policies from the old one.
        mask: True where the loss counts; None: everywhere.
    """
    positive = (1 - beta) * old_velocity + beta * velocity
    negative = (1 + beta) * old_velocity - beta * velocity
    good, bad = velocity_error(positive, target, mask), velocity_error(negative, target, mask)
    return optimality * good + (1 - optimality) * bad


def optimality_of(advantage: Float[Tensor, " B"], clip: float) -> Float[Tensor, " B"]:
    """``r = 1/2 + 1/2 clamp(A / clip, -1, 1)``."""
    return 0.5 + 0.5 * (advantage / clip).clamp(-1, 1)


def drawn_times(count: int, sigmas: Float[Tensor, " S1"], generator: torch.Generator) -> Float[Tensor, " B"]:
    """Times drawn evenly from a fine schedule (1 to 0, the last left out), so that they follow the pipeline's shift."""
    return sigmas[torch.randint(len(sigmas) - 1, (count,), generator=generator)]
