"""Losses of the forward process against a float64 reference written out, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from vggrpo.posttraining.forward_losses import (
    drawn_times,
    flow_dpo_loss,
    network_input,
    nft_loss,
    noised,
    optimality_of,
    velocity_error,
)  # fmt: skip


def draw(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_noised_states_have_the_flow_as_their_velocity():
    x0, eps = draw(2, 3, 2, 4)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(noised(x0, eps, t)[0], x0[0])
    torch.testing.assert_close(noised(x0, eps, t)[2], eps[2])
    step = 1e-4
    torch.testing.assert_close((noised(x0, eps, t + step) - noised(x0, eps, t)) / step, eps - x0)
    assert velocity_error(eps - x0, eps - x0).tolist() == [0, 0, 0]


def test_flow_dpo_against_the_formula_written_out():
    v_w, v_l, ref_w, ref_l, target_w, target_l = draw(6, 2, 5)
    beta = 7.0
    given = ((v_w, target_w), (v_l, target_l), (ref_w, target_w), (ref_l, target_l))
    found = flow_dpo_loss(*(velocity_error(v, t) for v, t in given), beta)
    for b in range(2):
        errors = [sum((x - y) ** 2 for x, y in zip(v[b].tolist(), t[b].tolist(), strict=True)) / 5
                  for v, t in ((v_w, target_w), (ref_w, target_w), (v_l, target_l), (ref_l, target_l))]  # fmt: skip
        inside = -beta / 2 * ((errors[0] - errors[1]) - (errors[2] - errors[3]))
        assert found[b].item() == pytest.approx(-math.log(1 / (1 + math.exp(-inside))))


def test_flow_dpo_before_the_first_step_is_log_two_and_its_gradient_pulls_towards_the_winner():
    winner, loser = (torch.tensor([1.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = flow_dpo_loss(winner, loser, winner.detach(), loser.detach(), 10.0)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert winner.grad.item() == pytest.approx(2.5) and loser.grad.item() == pytest.approx(-2.5)  # beta / 4


def test_nft_against_the_formula_written_out():
    v, old, target = draw(3, 2, 3)
    r, beta = torch.tensor([0.9, 0.2], dtype=torch.float64), 0.7
    found = nft_loss(v, old, target, r, beta)
    for b in range(2):
        numbers = list(zip(v[b].tolist(), old[b].tolist(), target[b].tolist(), strict=True))
        plus = sum(((1 - beta) * o + beta * x - y) ** 2 for x, o, y in numbers) / 3
        minus = sum(((1 + beta) * o - beta * x - y) ** 2 for x, o, y in numbers) / 3
        assert found[b].item() == pytest.approx(r[b].item() * plus + (1 - r[b].item()) * minus)


def test_nft_moves_towards_good_clips_away_from_bad_ones_and_nowhere_for_middling_ones():
    (old, target) = draw(2, 3, 4)
    v = old.clone().requires_grad_()
    r = optimality_of(torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64), 1.0)
    assert r.tolist() == [1.0, 0.0, 0.5]
    nft_loss(v, old, target, r, 1.0).sum().backward()
    towards = 2 * (old - target) / 4
    torch.testing.assert_close(v.grad, torch.stack([towards[0], -towards[1], torch.zeros(4, dtype=torch.float64)]))


def test_gradients():
    v, old, target = (x.requires_grad_() for x in draw(3, 2, 3))
    r = torch.tensor([0.8, 0.3], dtype=torch.float64)
    assert gradcheck(lambda v: nft_loss(v, old.detach(), target.detach(), r, 0.6), (v,))
    assert gradcheck(velocity_error, (v, target))
    errors = [x.abs().flatten()[:3].detach().requires_grad_() for x in draw(4, 3, seed=1)]
    assert gradcheck(lambda *e: flow_dpo_loss(*e, 3.0), errors)


def test_times_follow_the_schedule_and_leave_out_its_end():
    sigmas = torch.tensor([1.0, 0.9, 0.5, 0.0])
    times = drawn_times(300, sigmas, torch.Generator().manual_seed(0))
    assert set(times.tolist()) == set(sigmas[:3].tolist())
    assert all(80 < (times == s).sum() < 120 for s in sigmas[:3])


def test_the_registry_and_the_config_know_the_same_algorithms():
    from typing import get_args

    from vggrpo.config import TrainConfig
    from vggrpo.posttraining.algorithm import ALGORITHMS, find_algorithm

    assert set(get_args(TrainConfig.model_fields["algorithm"].annotation)) == set(ALGORITHMS)
    assert all(find_algorithm(name).needs_lgm in (True, False) for name in ALGORITHMS)


def test_the_card_says_where_the_signal_came_from():
    from vggrpo.config import load_config
    from vggrpo.posttraining.card import lora_card

    def card(*overrides):
        return " ".join(lora_card(load_config("tiny", overrides), 1, {}).split())

    assert "Its rewards are read by a latent geometry model (embedded): - `camera_motion_smoothness`" in card()
    assert "read by a geometry model (embedded) that sees decoded frames" in card("reward.space=rgb")
    assert "filtered by rewards, read by a latent" in card("algorithm=sft")
    epipolar = card("algorithm=dpo")
    assert "Sampson error" in epipolar and "- `camera_motion_smoothness`" not in epipolar
    assert "reprojection by a geometry model (embedded)" in card("algorithm=dpo", "dpo.pairs=geometry")


def test_a_given_first_frame_is_neither_noised_nor_counted():
    x0, eps, velocity = draw(3, 2, 3, 4, 2, 2)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    state, times, mask = network_input(x0, eps, t, pinned=True)
    torch.testing.assert_close(state[:, :, 0], x0[:, :, 0])
    torch.testing.assert_close(state[:, :, 1:], noised(x0, eps, t)[:, :, 1:])
    assert times.tolist() == [[0, 0.3, 0.3, 0.3], [0, 0.8, 0.8, 0.8]]
    velocity.requires_grad_()
    error = velocity_error(velocity, eps - x0, mask)
    torch.testing.assert_close(error, velocity_error(velocity[:, :, 1:], (eps - x0)[:, :, 1:]))
    (gradient,) = torch.autograd.grad(error.sum(), velocity)
    assert not gradient[:, :, 0].any() and gradient[:, :, 1:].all()
    free = network_input(x0, eps, t, pinned=False)
    assert torch.equal(free[0], noised(x0, eps, t)) and free[1] is t and free[2] is None
    old, optimality = velocity.detach() + 1, torch.tensor([0.9, 0.2], dtype=torch.float64)
    torch.testing.assert_close(
        nft_loss(velocity, old, eps - x0, optimality, 1.0, mask),
        nft_loss(velocity[:, :, 1:], old[:, :, 1:], (eps - x0)[:, :, 1:], optimality, 1.0),
    )
