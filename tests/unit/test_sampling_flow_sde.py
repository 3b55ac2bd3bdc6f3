"""The stochastic step: parity with public code, each variant against its formula, exact marginals, traps."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vggrpo.errors import UserError
from vggrpo.sampling import ode_step, sde_step

PEERS = np.load(Path(__file__).parents[1] / "golden" / "peers.npz")
OPTIONS = {
    "flow_grpo": {},
    "flow_grpo_wan": {"sigma_min": 0.1, "sigma_max": 0.9},
    "dance": {},
    "cps": {},
}


def peer(key):
    return torch.from_numpy(PEERS[key])


@pytest.mark.parametrize("i", [0, 1, 4, 8, 9])
def test_flow_grpo_step_equals_the_public_one(i):
    sigmas, x, v, noise = peer("A/sigmas"), peer("inputs/x4"), peer("inputs/v4"), peer("inputs/n4")
    step = sde_step(x, v, sigmas[i], sigmas[i + 1], noise_level=0.7, noise=noise)
    close = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.mean, peer(f"A/step{i}/mean"), **close)
    torch.testing.assert_close(step.next_sample, peer(f"A/step{i}/prev"), **close)
    torch.testing.assert_close(step.log_prob, peer(f"A/step{i}/log_prob"), **close)
    std = peer(f"A/step{i}/std_dev_t").flatten()[0] * (sigmas[i] - sigmas[i + 1]).sqrt()
    torch.testing.assert_close(step.std, std, **close)


def reference(x, v, t, t_next, a, variant, low=0.1, high=0.9):
    """Mean and std written as each variant's authors write them, in float64."""
    dt, x0 = t_next - t, x - t * v
    if variant == "cps":
        std = t_next * math.sin(a * math.pi / 2)
        return (1 - t_next) * x0 + math.sqrt(t_next**2 - std**2) * (x + (1 - t) * v), std
    if variant == "dance":
        return x + v * dt + a**2 / 2 * (x - (1 - t) * x0) / t**2 * dt, a * math.sqrt(-dt)
    stand_in = t_next if t > 0.999 else t
    s = a * math.sqrt(t / (1 - stand_in)) if variant == "flow_grpo" else low + (high - low) * t
    mean = x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
    return mean, s * math.sqrt(-dt)


@pytest.mark.parametrize("variant", OPTIONS)
@given(t=st.floats(0.05, 0.99) | st.just(1.0), share=st.floats(0.05, 0.95), a=st.floats(0.1, 1.0))
@settings(max_examples=30, deadline=None)
def test_each_variant_equals_its_formula(variant, t, share, a):
    """In float64, and in float32 within 1e-5 (of what is large, relative)."""
    generator = torch.Generator().manual_seed(0)
    x, v, noise = torch.randn(3, 2, 3, 4, dtype=torch.float64, generator=generator)
    t_next = t * share
    step = sde_step(x, v, t, t_next, noise_level=a, variant=variant, noise=noise, **OPTIONS[variant])
    mean, std = reference(x, v, t, t_next, a, variant)
    torch.testing.assert_close(step.mean, mean)
    torch.testing.assert_close(step.next_sample, mean + std * noise)
    expected = -((std * noise) ** 2).flatten(1).mean(1)
    if variant != "cps":
        expected = torch.distributions.Normal(mean, std).log_prob(mean + std * noise).flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob, expected)
    single = sde_step(
        x.float(), v.float(), t, t_next, noise_level=a, variant=variant, noise=noise.float(), **OPTIONS[variant]
    )
    std = torch.tensor(std, dtype=torch.float64)
    for ours, exact in zip(vars(single).values(), (mean + std * noise, mean, std, expected), strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - exact).abs().max() < 1e-5 * exact.abs().max().clamp_min(1)


@pytest.mark.parametrize("variant", OPTIONS)
def test_replay_scores_the_same_and_has_exact_gradients(variant):
    torch.manual_seed(1)
    x, v = torch.randn(2, 2, 2, 3, dtype=torch.float64)
    times = torch.tensor([0.8, 0.5], dtype=torch.float64), torch.tensor([0.6, 0.4], dtype=torch.float64)
    taken = sde_step(x, v, *times, noise_level=0.7, variant=variant, **OPTIONS[variant])

    def log_prob(velocity):
        return sde_step(
            x, velocity, *times, noise_level=0.7, variant=variant, next_sample=taken.next_sample, **OPTIONS[variant]
        ).log_prob

    torch.testing.assert_close(log_prob(v), taken.log_prob)
    assert torch.autograd.gradcheck(log_prob, v.clone().requires_grad_())


def test_times_per_sample_equal_separate_calls():
    torch.manual_seed(2)
    x, v, noise = torch.randn(3, 2, 4, 2, 3, 3)
    both = sde_step(x, v, torch.tensor([0.9, 0.3]), torch.tensor([0.8, 0.2]), noise_level=0.7, noise=noise)
    one = sde_step(x[1:], v[1:], 0.3, 0.2, noise_level=0.7, noise=noise[1:])
    torch.testing.assert_close(both.next_sample[1:], one.next_sample)
    torch.testing.assert_close(both.log_prob[1:], one.log_prob)


@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("t", [1.0, 0.9999990])
def test_the_start_is_finite_and_bounded(t, variant):
    x, v = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    step = sde_step(x, v, t, 0.96, noise_level=0.7, variant=variant, noise=x, **OPTIONS[variant])
    assert step.std <= 0.9 and step.mean.abs().max() < 10  # without the stand-in flow_grpo's s is 695 at .9999990
    assert step.log_prob.isfinite().all()
    almost = sde_step(x, v, 0.9999, 0.96, noise_level=0.7, variant=variant, noise=x, **OPTIONS[variant])
    torch.testing.assert_close(step.mean, almost.mean, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("variant", OPTIONS)
def test_mask_holds_and_leaves_out(variant):
    torch.manual_seed(3)
    x, v, noise = torch.randn(3, 2, 4, 3, 2, 2)
    mask = torch.ones(1, 1, 3, 1, 1, dtype=torch.bool)
    mask[:, :, 0] = False
    step = sde_step(x, v, 0.8, 0.6, noise_level=0.7, variant=variant, noise=noise, mask=mask, **OPTIONS[variant])
    inner = sde_step(
        x[:, :, 1:], v[:, :, 1:], 0.8, 0.6, noise_level=0.7, variant=variant, noise=noise[:, :, 1:], **OPTIONS[variant]
    )
    assert torch.equal(step.next_sample[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(step.next_sample[:, :, 1:], inner.next_sample)
    torch.testing.assert_close(step.log_prob, inner.log_prob)


def test_last_step():
    x, v = torch.randn(2, 2, 8)
    assert sde_step(x, v, 0.1, 0.0, noise_level=0.7).std > 0
    last = sde_step(x, v, 0.1, 0.0, noise_level=0.7, variant="cps")
    assert last.std == 0
    torch.testing.assert_close(last.next_sample, x - 0.1 * v)
    torch.testing.assert_close(ode_step(x, v, 0.1, 0.0), x - 0.1 * v)


def test_bad_arguments_are_user_errors():
    x = torch.zeros(1, 4)
    for options in (
        {"noise_level": 0.0},
        {"noise_level": 0.7, "variant": "euler"},
        {"noise_level": 0.7, "variant": "flow_grpo_wan"},
    ):
        with pytest.raises(UserError):
            sde_step(x, x, 0.5, 0.4, **options)
    with pytest.raises(UserError, match="t_next"):
        sde_step(x, x, 0.4, 0.5, noise_level=0.7)


@pytest.mark.parametrize(
    ("variant", "expected"), [("flow_grpo", 0.5), ("dance", 0.5), ("flow_grpo_wan", 0.5), ("cps", 0.426)]
)
def test_marginals_on_a_gaussian_with_exact_velocity(variant, expected):
    """Data N(0, .5^2): x_t is N(0, (1-t)^2 .25 + t^2), so the exact velocity is linear. 1,000 steps must give std .5.

    The Euler variants keep the marginals; `cps` does not, however fine the steps: it comes out at about .426.
    """
    torch.manual_seed(4)
    x = torch.randn(1, 20_000, dtype=torch.float64)
    u = torch.linspace(1, 0, 1001, dtype=torch.float64)
    for t, t_next in zip(u[:-1].tolist(), u[1:].tolist(), strict=True):
        velocity = x * (t - 0.25 * (1 - t)) / ((1 - t) ** 2 * 0.25 + t**2)
        if t_next == 0:
            x = ode_step(x, velocity, t, t_next)
        else:
            x = sde_step(x, velocity, t, t_next, noise_level=0.7, variant=variant, **OPTIONS[variant]).next_sample
    assert abs(float(x.std()) / expected - 1) < 0.01


@pytest.mark.parametrize(
    "t, t_next",
    [(0, 1), (0.5, 0.5), (1.5, 0.2), (torch.tensor([0.9, 0.2]), torch.tensor([0.5, 0.5])), (0.5, torch.tensor(-0.1)),
     (float("nan"), 0.1)],
)  # fmt: skip
def test_times_run_from_one_to_zero(t, t_next):
    x = torch.zeros(2, 1, 1, 2, 2)
    with pytest.raises(UserError, match="times must be 0 <= t_next < t <= 1"):
        sde_step(x, x, t, t_next, noise_level=0.7)
    assert sde_step(x, x, 1, 0.5, noise_level=0.7).mean.isfinite().all()
