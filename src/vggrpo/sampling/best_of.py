"""Best of N: sample N candidates of each video, keep the one whose latents have the highest reward.

The simple rival of guidance and of post-training: N times the sampling, one decode. Candidate 0 is the video that plain
sampling would have made; the others start from noise of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.sampling.guidance import LatentReward
from vggrpo.sampling.seeds import derive_seed


def candidate_seed(seed: int, candidate: int) -> int:
    """Seed of the initial noise of one candidate; candidate 0 keeps the video's own."""
    return seed if candidate == 0 else derive_seed("candidate", seed, candidate)


def best_of(
    sample: Callable[[Sequence[int]], Float[Tensor, "B C T H W"]],
    seeds: Sequence[int],
    prompts: Sequence[str],
    reward: LatentReward,
    candidates: int,
) -> tuple[Float[Tensor, "B C T H W"], Float[Tensor, "N B"]]:
    """The best candidate of each video, and the rewards of all of them (NaN where one could not be computed).

    Args:
        sample: latents from the seeds of the initial noise.
        seeds: of the B videos.
        prompts: of the B videos.
        reward: judges clean latents.
        candidates: N >= 1.

    A video none of whose candidates can be judged keeps candidate 0; its rewards are all NaN, which says so.
    """
    best, rewards = torch.empty(0), []
    top = torch.full((len(seeds),), -torch.inf)
    for number in range(candidates):
        latents = sample([candidate_seed(seed, number) for seed in seeds])
        with torch.no_grad():
            value = reward(latents, prompts).float().cpu()
        rewards.append(value)
        better = value > top  # NaN is never better
        top = torch.where(better, value, top)
        best = latents if number == 0 else torch.where(better.to(latents.device).view(-1, 1, 1, 1, 1), latents, best)
    return best, torch.stack(rewards)
