"""Random numbers that depend on what they are for, not on when or where they are drawn.

Every draw of a training run has its own generator, seeded from (run seed, update, prompt, sample, ...). So a run
repeats bit for bit,
resumes without replaying a stream, and gives the same samples however the batch is split over processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any tuple of numbers and words; different tuples give unrelated seeds."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_noise(
    seeds: Sequence[int], shape: Sequence[int], device: str | torch.device = "cpu"
) -> Float[Tensor, "B ..."]:
    """Standard normal noise (B, *shape), one CPU generator per seed: the same on every device and for every batch
    split.

    The first draw of a seed equals what diffusers makes from `generator=torch.Generator("cpu").manual_seed(seed)`.
    """
    drawn = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(device)
