"""Roll-outs: videos from the stochastic sampler, with what the policy gradient needs to score them again.

Only the steps of the **window** are stochastic and trained; the others are plain Euler steps of the ODE, need no
log-probability and keep no state. Samples that start from the same noise and prompt share everything before the window,
so it is computed once for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.models.base import VideoModel
from vggrpo.sampling.first_frame import acted_frames, frame_times, pin_first_frame
from vggrpo.sampling.flow_sde import SDEStep, Variant, ode_step, sde_step
from vggrpo.sampling.seeds import derive_seed, seeded_noise


@dataclass(frozen=True)
class NoiseSettings:
    """How the stochastic steps add noise; the arguments of `sde_step`."""

    noise_level: float = 0.7
    variant: Variant = "flow_grpo"
    max_t: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None


@dataclass(frozen=True)
class Trajectory:
    """What a roll-out leaves behind. W = number of stochastic steps.

    Attributes:
        latents: the clean latents, (B, C, T', H', W') float32.
        sigmas: the schedule, (S+1,).
        steps: indices into `sigmas` of the stochastic steps, (W,).
        samples: W tensors (B, C, T', H', W'), the state before each stochastic step.
        next_samples: W tensors, the state after it (where steps follow each other, the same tensor as the next
            `samples`); in the format they were kept in.
        log_probs: (B, W), under the policy that made them.
        means: W tensors, the Gaussians' means; kept only when asked for, else empty.
        pinned: whether the first latent frame was given.
    """

    latents: Float[Tensor, "B C T H W"]
    sigmas: Float[Tensor, " S1"]
    steps: tuple[int, ...]
    samples: tuple[Float[Tensor, "B C T H W"], ...]
    next_samples: tuple[Float[Tensor, "B C T H W"], ...]
    log_probs: Float[Tensor, "B W"]
    means: tuple[Float[Tensor, "B C T H W"], ...] = ()
    pinned: bool = False

    @property
    def mask(self) -> Bool[Tensor, "1 1 T 1 1"] | None:
        """Where the policy acts; None: everywhere."""
        return acted_frames(self.latents.shape[2], self.latents.device) if self.pinned else None


def guided_velocity(
    model: VideoModel,
    latents: Float[Tensor, "B C T H W"],
    t: Float[Tensor, " B"],
    text: Float[Tensor, "B L D"],
    *,
    guidance_scale: float = 1.0,
    negative_text: Float[Tensor, "1 L D"] | None = None,
    pinned: bool = False,
) -> Float[Tensor, "B C T H W"]:
    """Velocity with classifier-free guidance `v_neg + g (v - v_neg)`; `g = 1` is the plain velocity at half the
    cost. `pinned`: the first latent frame is given and clean, whatever `t`."""
    if pinned:
        t = frame_times(t, latents.shape[2])
    if guidance_scale == 1.0:
        return model.predict_velocity(latents, t, text)
    if negative_text is None:
        raise UserError(
            f"guidance_scale is {guidance_scale} but no negative text was given; encode the prompt '' and pass it"
        )
    both = torch.cat([text, negative_text.expand_as(text)])
    velocity, negative = model.predict_velocity(latents.repeat(2, 1, 1, 1, 1), torch.cat([t, t]), both).chunk(2)
    return negative + guidance_scale * (velocity - negative)


def choose_window(
    num_steps: int, size: int, *, kind: str = "contiguous", first: int = 0, last: int | None = None, seed: int = 0
) -> tuple[int, ...]:
    """Indices of the stochastic steps.

    Args:
        num_steps: steps of the schedule.
        size: stochastic steps, at least 1.
        kind: "contiguous" (a run that starts anywhere in the range) or "random" (any subset of the range).
        first: first step that may be chosen.
        last: last step that may be chosen; None: the last but one, because noise of the very last step is never
            removed.
        seed: decides the choice.
    """
    last = num_steps - 2 if last is None else last
    if not (0 <= first <= last < num_steps - 1) or not 1 <= size <= last - first + 1:
        raise UserError(
            f"a window of {size} steps in steps {first} to {last} of {num_steps} is impossible; the "
            "last step is always deterministic: "
            f"lower sampling.window or raise sampling.num_steps"
        )
    generator = torch.Generator().manual_seed(seed)
    if kind == "contiguous":
        start = first + int(torch.randint(last - first + 2 - size, (1,), generator=generator))
        return tuple(range(start, start + size))
    chosen = first + torch.randperm(last - first + 1, generator=generator)[:size]
    return tuple(sorted(chosen.tolist()))


@torch.no_grad()
def rollout(
    model: VideoModel,
    text: Float[Tensor, "B L D"],
    *,
    shape: Sequence[int],
    noise_seeds: Sequence[int],
    step_seeds: Sequence[int],
    sigmas: Float[Tensor, " S1"],
    sde_steps: Sequence[int],
    noise: NoiseSettings | None = None,
    guidance_scale: float = 1.0,
    negative_text: Float[Tensor, "1 L D"] | None = None,
    micro_batch: int | None = None,
    prompt_ids: Sequence[int] | None = None,
    offload: bool = False,
    first_frame: Float[Tensor, "B C 1 H W"] | None = None,
    keep_means: bool = False,
    keep_dtype: torch.dtype = torch.float32,
) -> Trajectory:
    """Sample B videos' latents.

    Args:
        model, text: the policy, and one embedding per sample.
        shape: (C, T', H', W') of the latents.
        noise_seeds, step_seeds: seeds of each sample's initial noise, and of its noise in the stochastic steps.
        sigmas: schedule from 1 to 0.
        sde_steps, noise: indices of the stochastic steps (empty gives the ODE's sample), and their noise.
        guidance_scale, negative_text: 1 = no guidance, and the embedding that guidance needs.
        micro_batch: samples per network call; None = all.
        prompt_ids: which prompt each sample has; samples of one prompt and one noise seed then share the steps before
            the window.
        offload: keep the kept states on the CPU.
        first_frame: the given first latent frame of each sample (image to video); None: none.
        keep_means: keep the Gaussians' means too, in float32.
        keep_dtype: number format of the kept states. The sampler goes on from the rounded states and the
            log-probabilities are theirs, so a narrow format adds a little noise and no error: rounding only what is
            kept would move log-probabilities by more than a usual clip.
    """
    noise = noise or NoiseSettings()
    batch, steps = len(noise_seeds), tuple(sorted(sde_steps))
    sigmas = sigmas.to(model.device)
    chunks = _Chunks(model, micro_batch or batch, guidance_scale, negative_text, first_frame is not None)
    mask = None if first_frame is None else acted_frames(shape[1], model.device)
    start = steps[0] if steps else 0
    shared, index = _distinct(prompt_ids, noise_seeds)
    latents = seeded_noise([noise_seeds[i] for i in shared], shape, model.device)
    latents = pin_first_frame(latents, None if first_frame is None else first_frame[shared])
    latents = chunks.descend(latents, sigmas[: start + 1], text[shared], mask)[index]
    record = _Record(offload, keep_means, keep_dtype)
    for i in range(start, len(sigmas) - 1):
        if i in steps:
            latents = latents.to(keep_dtype).float()
        velocity = chunks.velocity(latents, sigmas[i], text)
        if i not in steps:
            latents = ode_step(latents, velocity, sigmas[i], sigmas[i + 1], mask=mask)
            continue
        eps = seeded_noise([derive_seed(seed, i) for seed in step_seeds], shape, model.device)
        score = partial(sde_step, latents, velocity, sigmas[i], sigmas[i + 1], mask=mask, **vars(noise))
        step = _kept_step(score, eps, keep_dtype)
        record.add(latents, step, follows=i - 1 in steps)
        latents = step.next_sample
    return record.trajectory(latents, sigmas, steps, pinned=mask is not None)


def ode_sample(
    model: VideoModel,
    text: Float[Tensor, "B L D"],
    *,
    shape: Sequence[int],
    seeds: Sequence[int],
    num_steps: int,
    shift: float | None = None,
    guidance_scale: float = 1.0,
    negative_text: Float[Tensor, "1 L D"] | None = None,
) -> Float[Tensor, "B C T H W"]:
    """Clean latents of the deterministic Euler sampler."""
    return rollout(
        model,
        text,
        shape=shape,
        noise_seeds=seeds,
        step_seeds=seeds,
        sigmas=model.sigmas(num_steps, shift),
        sde_steps=(),
        guidance_scale=guidance_scale,
        negative_text=negative_text,
    ).latents


@dataclass(frozen=True)
class _Chunks:
    """Network calls in micro-batches."""

    model: VideoModel
    size: int
    guidance_scale: float
    negative_text: Tensor | None
    pinned: bool

    def velocity(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        parts = [
            guided_velocity(
                self.model,
                x,
                t.expand(len(x)),
                y,
                guidance_scale=self.guidance_scale,
                negative_text=self.negative_text,
                pinned=self.pinned,
            )
            for x, y in zip(latents.split(self.size), text.split(self.size), strict=True)
        ]
        return torch.cat(parts)

    def descend(self, latents: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Latents at the last of `sigmas`, by deterministic steps from the first."""
        for i in range(len(sigmas) - 1):
            latents = ode_step(latents, self.velocity(latents, sigmas[i], text), sigmas[i], sigmas[i + 1], mask=mask)
        return latents


def _kept_step(score: Callable[..., SDEStep], eps: Tensor, dtype: torch.dtype) -> SDEStep:
    """The stochastic step with this noise, ending at a state that `dtype` can hold."""
    step = score(noise=eps)
    return step if dtype == torch.float32 else score(next_sample=step.next_sample.to(dtype))


class _Record:
    """What the stochastic steps of a roll-out leave behind."""

    def __init__(self, offload: bool, keep_means: bool, dtype: torch.dtype) -> None:
        self.offload, self.keep_means, self.dtype = offload, keep_means, dtype
        self.samples: list[Tensor] = []
        self.next_samples: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.means: list[Tensor] = []

    def add(self, latents: Tensor, step: SDEStep, *, follows: bool) -> None:
        """A step from `latents`; `follows`: the step before it was stochastic too, and they share a state."""
        self.samples.append(self.next_samples[-1] if follows else _keep(latents.to(self.dtype), self.offload))
        self.next_samples.append(_keep(step.next_sample.to(self.dtype), self.offload))
        self.log_probs.append(step.log_prob)
        self.means += [_keep(step.mean, self.offload)] if self.keep_means else []

    def trajectory(self, latents: Tensor, sigmas: Tensor, steps: tuple[int, ...], *, pinned: bool) -> Trajectory:
        """With the clean latents that all of it led to."""
        scores = torch.stack(self.log_probs, dim=1) if steps else latents.new_zeros(len(latents), 0)
        kept = (tuple(self.samples), tuple(self.next_samples), scores, tuple(self.means))
        return Trajectory(latents, sigmas, steps, *kept, pinned)


def _distinct(prompt_ids: Sequence[int] | None, seeds: Sequence[int]) -> tuple[list[int], list[int]]:
    """Samples whose start differs (first occurrence of each), and for every sample its place among them."""
    keys = [(i if prompt_ids is None else prompt_ids[i], seed) for i, seed in enumerate(seeds)]
    first: dict[tuple[int, int], int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    place = {key: n for n, key in enumerate(first)}
    return list(first.values()), [place[key] for key in keys]


def _keep(latents: Tensor, offload: bool) -> Tensor:
    return latents.cpu() if offload else latents
