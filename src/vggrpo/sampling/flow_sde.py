"""One stochastic step of a rectified flow and its log-probability (Flow-GRPO's ODE -> SDE, equation of METHOD section
3).

The reverse SDE with the marginals of the flow `dx = v dt` is, for any noise scale `s(t)`,

    dx = [v + s^2 / (2t) (x + (1-t) v)] dt + s dw,        t: 1 -> 0, dt < 0,

whose Euler-Maruyama step is Gaussian: `mean = x + drift dt`, `std = s sqrt(-dt)`. The variants differ in `s`:

| variant | noise | step |
|---|---|---|
| `flow_grpo` | `s = a sqrt(t / (1-t))` (the paper) | Euler-Maruyama |
| `flow_grpo_wan` | `s = sigma_min + (sigma_max - sigma_min) t`; `a` has no part in it | Euler-Maruyama |
| `dance` | `s = a`; written `x + v dt + a^2/2 (x - (1-t) x0) / t^2 dt`, which is the same drift | Euler-Maruyama |
| `cps` | `std = t_next sin(a pi / 2)` | `mean = (1-t_next) x0 + sqrt(t_next^2 - std^2) eps`, coefficient-preserving |

with `x0 = x - t v`, `eps = x + (1-t) v`. `log_prob` is the **mean** over the dimensions that the policy acts on, so its
scale does not depend on the video's size; `cps` leaves the normaliser out: `-(x_next - mean)^2`.

Near t = 1 the scale of `flow_grpo` diverges. Above `max_t`, `t_next` stands in for `t` inside `1 - t` of the noise
scale (nowhere else),
which bounds the step's std by `a`. The default `max_t` of .999 also catches diffusers' UniPC, which starts at 0.9999990
and would give s = 695.

`cps` does not keep the flow's marginals, however fine the steps: on data N(0, .5^2) with the exact velocity, a = .7 and
1,000 steps it ends at a standard deviation of .426, the Euler variants at .5 within 1 %.

The last step (t_next = 0) adds noise that nothing removes in the Euler variants, and none in `cps`: roll-outs keep it
deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vggrpo.errors import UserError

Variant = Literal["flow_grpo", "flow_grpo_wan", "dance", "cps"]
VARIANTS: tuple[str, ...] = get_args(Variant)
DEFAULT_MAX_T = 0.999


@dataclass(frozen=True)
class SDEStep:
    """One step of the policy.

    Attributes:
        next_sample: x at `t_next`, same shape as the sample.
        mean: the Gaussian's mean, same shape.
        std: the Gaussian's standard deviation, broadcastable to the sample (scalar times give a scalar).
        log_prob: (B,), mean over the acted dimensions.
    """

    next_sample: Float[Tensor, "B ..."]
    mean: Float[Tensor, "B ..."]
    std: Float[Tensor, ...]
    log_prob: Float[Tensor, " B"]


def diffusion_scale(
    t: Float[Tensor, ...],
    t_next: Float[Tensor, ...],
    *,
    noise_level: float,
    variant: Variant = "flow_grpo",
    max_t: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Float[Tensor, ...]:
    """The diffusion coefficient `s` of the Euler variants (the step's std is `s sqrt(t - t_next)`)."""
    if variant == "flow_grpo":
        limit = DEFAULT_MAX_T if max_t is None else max_t
        return noise_level * torch.sqrt(t / (1 - torch.where(t > limit, t_next, t)))
    if variant == "flow_grpo_wan":
        if sigma_min is None or sigma_max is None:
            raise UserError(
                "variant 'flow_grpo_wan' needs sigma_min and sigma_max (usual: the schedule's last and second sigma)"
            )
        return sigma_min + (sigma_max - sigma_min) * t
    if variant == "dance":
        return torch.full_like(t, noise_level)
    raise UserError(f"unknown SDE variant {variant!r}; there are {', '.join(VARIANTS)}")


def sde_step(
    sample: Float[Tensor, "B ..."],
    velocity: Float[Tensor, "B ..."],
    t: float | Float[Tensor, ...],
    t_next: float | Float[Tensor, ...],
    *,
    noise_level: float,
    variant: Variant = "flow_grpo",
    max_t: float | None = None,
    noise: Float[Tensor, "B ..."] | None = None,
    next_sample: Float[Tensor, "B ..."] | None = None,
    mask: Bool[Tensor, ...] | None = None,
    generator: torch.Generator | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> SDEStep:
    """Take (or score) one stochastic step from `t` to `t_next`; see the module for the formulas.

    Args:
        sample, velocity: x at `t`, and the network's `eps - x0` there; float32, or float64 if given so.
        t, t_next: flow times, `0 <= t_next < t <= 1`; numbers, or broadcastable to the sample.
        noise_level: `a`; larger explores more. `flow_grpo_wan` takes its scale from `sigma_min`, `sigma_max` instead.
        variant: which noise scale and which step.
        max_t: `flow_grpo` only: above it, `t_next` stands in for `t` in `1 - t` of the noise scale.
        noise: standard normal noise; drawn from `generator` when neither it nor `next_sample` is given.
        next_sample: score this step instead of taking one (replay); the log-probability then carries gradients to
            `velocity`.
        mask: True where the policy acts, broadcastable to the sample. Elsewhere the sample is held: not moved, noised
            or counted.
        generator: source of the noise.
        sigma_min, sigma_max: `flow_grpo_wan`: s at t = 0 and at t = 1.

    Raises:
        UserError: for a deterministic step (no noise has no log-probability), an unknown variant, or times out of
            order.
    """
    dtype = torch.promote_types(sample.dtype, torch.float32)
    sample, velocity = sample.to(dtype), velocity.to(dtype)
    _check_step(t, t_next, noise_level, variant)
    scale = {"noise_level": noise_level, "max_t": max_t, "sigma_min": sigma_min, "sigma_max": sigma_max}
    mean, std = _gaussian(sample, velocity, _time(t, sample), _time(t_next, sample), variant, scale)
    acts = None if mask is None else mask.to(sample.device).expand_as(sample)
    if acts is not None:
        mean = torch.where(acts, mean, sample)
    if next_sample is None:
        if noise is None:
            noise = torch.randn(sample.shape, dtype=dtype, device=sample.device, generator=generator)
        step = std * noise.to(dtype)
        next_sample = mean + (step if acts is None else torch.where(acts, step, 0.0))
    else:
        next_sample = next_sample.to(dtype)
    return SDEStep(next_sample, mean, std, _log_prob(next_sample.detach(), mean, std, variant, acts))


def _check_step(t: float | Tensor, t_next: float | Tensor, noise_level: float, variant: str) -> None:
    known = not any(
        isinstance(time, Tensor) and time.device.type != "cpu" for time in (t, t_next)
    )  # asking a GPU waits
    if known:
        now, then = torch.as_tensor(t), torch.as_tensor(t_next)
        if not ((then >= 0) & (then < now) & (now <= 1)).all():
            raise UserError(f"times must be 0 <= t_next < t <= 1, got t {t} and t_next {t_next}")
    if noise_level <= 0 and variant != "flow_grpo_wan":
        raise UserError(
            f"noise_level must be > 0, got {noise_level}: a deterministic step has no log-probability; use ode_step"
        )


def _gaussian(
    sample: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, variant: Variant, scale: Mapping[str, Any]
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, ...]]:
    """Mean and standard deviation of the step; `scale`: the arguments of `diffusion_scale`."""
    if variant == "cps":
        angle = scale["noise_level"] * math.pi / 2
        std = t_next * math.sin(angle)
        x0, eps = sample - t * velocity, sample + (1 - t) * velocity
        # sqrt(t_next^2 - std^2), of which float32 would leave few digits near noise level 1.
        return (1 - t_next) * x0 + t_next * abs(math.cos(angle)) * eps, std
    s = diffusion_scale(t, t_next, variant=variant, **scale)
    dt = t_next - t
    return sample + (velocity + s**2 / (2 * t) * (sample + (1 - t) * velocity)) * dt, s * torch.sqrt(-dt)


def ode_step(
    sample: Float[Tensor, "B ..."],
    velocity: Float[Tensor, "B ..."],
    t: float | Float[Tensor, ...],
    t_next: float | Float[Tensor, ...],
    *,
    mask: Bool[Tensor, ...] | None = None,
) -> Float[Tensor, "B ..."]:
    """The deterministic Euler step `x + v (t_next - t)`; where `mask` is False the sample is held."""
    dtype = torch.promote_types(sample.dtype, torch.float32)
    sample = sample.to(dtype)
    moved = sample + velocity.to(dtype) * (_time(t_next, sample) - _time(t, sample))
    return moved if mask is None else torch.where(mask.to(sample.device).expand_as(sample), moved, sample)


def _log_prob(next_sample: Tensor, mean: Tensor, std: Tensor, variant: str, acts: Tensor | None) -> Float[Tensor, " B"]:
    """Mean over the acted dimensions of `-(x - mean)^2 / (2 std^2) - log std - log sqrt(2 pi)` (`cps`: of `-(x -
    mean)^2`).

    `next_sample` is data: the gradient goes to the mean alone.
    """
    log_prob = -((next_sample - mean) ** 2)
    if variant != "cps":
        log_prob = log_prob / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    if acts is None:
        return log_prob.flatten(1).mean(dim=1)
    counted = torch.where(acts, log_prob, 0.0).flatten(1).sum(dim=1)
    return counted / acts.flatten(1).sum(dim=1).clamp_min(1)


def _time(t: float | Tensor, sample: Tensor) -> Tensor:
    """Time as a tensor of the sample's type that broadcasts against it; a (B,) tensor means one time per sample."""
    time = torch.as_tensor(t, dtype=sample.dtype, device=sample.device)
    if time.ndim == 1 and sample.ndim > 1 and time.shape[0] in (1, sample.shape[0]):
        time = time.view(-1, *[1] * (sample.ndim - 1))
    return time
