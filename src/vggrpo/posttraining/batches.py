"""What the algorithms share: which items an update takes, clips of the current policy, and the base model's motion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.config import RELATIVE_REWARDS
from vggrpo.distributed import Processes
from vggrpo.posttraining.algorithm import Context
from vggrpo.posttraining.micro_batch import rollout_micro_batch
from vggrpo.posttraining.scoring import measure_motion
from vggrpo.posttraining.watch import BaseMotion, base_motion_by
from vggrpo.sampling.rollout import rollout
from vggrpo.sampling.seeds import derive_seed


def items_of(number: int, per_update: int, total: int, seed: int) -> list[int]:
    """Places of the items of update `number`: a new random order of all `total` items each time round."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for place in range(number * per_update, (number + 1) * per_update):
        epoch, offset = divmod(place, total)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
            orders[epoch] = torch.randperm(total, generator=generator).tolist()
        chosen.append(orders[epoch][offset])
    return chosen


def latent_shape(context: Context) -> tuple[int, int, int, int]:
    """(C, T', H', W') of the configured clips."""
    data = context.config.data
    return context.model.latent_spec.latent_shape(data.num_frames, data.height, data.width)


@torch.no_grad()
def sample_clips(context: Context, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "B C T H W"]:
    """Clean latents of the deterministic sampler, with whatever weights are on; one seed and one prompt a clip, and the
    prompt's first frame where the recipe gives one."""
    sampling, device = context.config.sampling, context.model.device
    negative = context.conditions.text([""], device) if sampling.guidance_scale != 1 else None
    roll_out = partial(
        rollout,
        context.model,
        context.conditions.text(prompts, device),
        shape=latent_shape(context),
        noise_seeds=seeds,
        step_seeds=seeds,
        sigmas=context.model.sigmas(sampling.num_steps, sampling.shift),
        sde_steps=(),
        guidance_scale=sampling.guidance_scale,
        negative_text=negative,
        first_frame=context.conditions.first_frames(prompts, device),
    )
    at_once = rollout_micro_batch(context.config, context.model, Processes())
    return at_once.run(len(seeds), device, lambda size: roll_out(micro_batch=size)).latents


def measure_base_motion(context: Context, prompts: Sequence[str], known: dict[str, BaseMotion]) -> None:
    """Add what the base model shows for the prompts that `known` lacks, if a reward asks for it.

    Every process measures all of them: they are few, once per prompt.
    """
    samples = context.config.grpo.base_travel_samples
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    if not new or not samples or not set(RELATIVE_REWARDS) & set(context.config.rewards):
        return
    assert context.lgm is not None
    jobs = [(p, derive_seed(context.config.seed, "base", p, k)) for p in new for k in range(samples)]
    with context.policy.reference():
        latents = sample_clips(context, [prompt for prompt, _ in jobs], [seed for _, seed in jobs])
    motion = measure_motion(context.lgm, latents, context.config.lgm.micro_batch).view(3, len(new), samples)
    known.update(base_motion_by(new, motion.nanmean(dim=2).T.tolist()))


def share_of(context: Context, count: int) -> range:
    """This process's part of `count` samples."""
    part = context.processes.share(count)
    return range(part.start, part.stop)


def mean_over_processes(context: Context, values: Float[Tensor, " B"]) -> float:
    """Mean of all processes' values."""
    sums = torch.stack([values.double().sum(), torch.tensor(float(len(values)), device=values.device).double()])
    sums = context.processes.sum(sums.float() if values.device.type == "mps" else sums)
    return float(sums[0] / sums[1])
