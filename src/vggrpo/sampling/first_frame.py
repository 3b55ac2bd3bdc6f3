"""Image to video: the first latent frame is given, and neither noised, nor moved, nor scored, nor trained.

Wan2.2-TI2V takes a timestep per token. A given first frame is clean, so its tokens have time 0 while all others have
the sampler's, and the stochastic step leaves it out by its mask.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def acted_frames(frames: int, device: torch.device) -> Bool[Tensor, "1 1 T 1 1"]:
    """True where the policy acts: every latent frame but the first."""
    return (torch.arange(frames, device=device) > 0).view(1, 1, frames, 1, 1)


def frame_times(t: Float[Tensor, " B"], frames: int) -> Float[Tensor, "B T"]:
    """The time of each latent frame: 0 for the given first one, `t` for the others."""
    times = t[:, None].repeat(1, frames)
    times[:, 0] = 0.0
    return times


def pin_first_frame(
    latents: Float[Tensor, "B C T H W"], first: Float[Tensor, "B C 1 H W"] | None
) -> Float[Tensor, "B C T H W"]:
    """`latents` with `first` in its place; unchanged where none is given."""
    return latents if first is None else torch.cat([first.to(latents), latents[:, :, 1:]], dim=2)
