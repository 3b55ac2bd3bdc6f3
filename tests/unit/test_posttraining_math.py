"""Advantages, clipped loss and KL: parity with public code and with the definition written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vggrpo.posttraining import clipped_policy_loss, gaussian_kl, group_advantages
from vggrpo.posttraining.advantage import asked_rewards, judged_samples

PEERS = np.load(Path(__file__).parents[1] / "golden" / "peers.npz")
GROUP = torch.arange(12) // 4


def peer(key):
    return torch.from_numpy(PEERS[key])


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("flow_grpo_groupstd", {}),
        ("flow_grpo_globalstd", {"std_scope": "global"}),
        ("verl_groupstd", {"std": "sample"}),
        ("verl_globalstd", {"std": "sample", "std_scope": "global"}),
        ("dancegrpo", {"std": "sample", "eps": 1e-8}),
    ],
)
def test_advantages_equal_the_public_ones(key, options):
    ours = group_advantages(peer("E/rewards")[None], GROUP, **options)
    torch.testing.assert_close(ours, peer(f"E/{key}").double(), rtol=1e-5, atol=1e-6)
    assert ours[4:8].eq(0).all()


def test_two_rewards_are_normalised_apart():
    rewards = torch.stack([peer("E_two/r_motion"), peer("E_two/r_geo")])
    group = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(group_advantages(rewards, group), peer("E_two/decoupled_mean"), rtol=1e-5, atol=1e-6)
    summed = group_advantages(rewards, group, mode="sum")
    torch.testing.assert_close(summed, peer("E_two/sum_then_norm"), rtol=1e-5, atol=1e-6)
    weighted = group_advantages(rewards, group, weights=torch.tensor([3.0, 1.0]))
    motion, geometry = (group_advantages(rewards[i : i + 1], group) for i in range(2))
    torch.testing.assert_close(weighted, 0.75 * motion + 0.25 * geometry)


def test_invalid_samples_do_not_move_the_others():
    rewards = torch.tensor([[0.1, 0.4, torch.nan, 0.8], [0.3, 0.1, 0.9, 0.2]])
    group = torch.zeros(4, dtype=torch.long)
    worst = group_advantages(rewards, group)
    clean = group_advantages(rewards[:1, [0, 1, 3]], torch.zeros(3, dtype=torch.long))
    second = group_advantages(rewards[1:], group)
    torch.testing.assert_close(2 * worst[[0, 1, 3]], clean + second[[0, 1, 3]])
    torch.testing.assert_close(2 * worst[2], clean.min() + second[2])
    assert group_advantages(rewards, group, invalid="drop")[2] == 0
    assert group_advantages(torch.full((1, 4), torch.nan), group).eq(0).all()


def test_a_reward_that_does_not_apply_or_weighs_nothing_leaves_the_others_their_say():
    nan = torch.nan
    rewards = torch.tensor([[0.1, 0.4, 0.8, 0.2, 0.3, 0.9], [nan, nan, nan, 0.5, 0.2, nan]], dtype=torch.float64)
    group, valid = torch.arange(6) // 3, rewards.isfinite()
    alone = group_advantages(rewards[:1], group)
    for mode, share in (("decoupled", 0.5), ("sum", 1.0)):  # of all weights, as a mean; of the rewards that are there
        found = group_advantages(rewards, group, mode=mode, invalid="drop")
        torch.testing.assert_close(found[:3], share * alone[:3])
        assert found[3:5].ne(0).all() and found[5] == 0  # where others of the group have it, it makes invalid
        watched = group_advantages(rewards, group, mode=mode, invalid="drop", weights=torch.tensor([1.0, 0.0]))
        torch.testing.assert_close(watched, alone)
    pair = group_advantages(rewards[1:, 3:5], group[3:5])
    second = torch.cat([torch.zeros(3), pair, pair.min()[None]])
    torch.testing.assert_close(group_advantages(rewards, group), (alone + second) / 2)  # "worst" is what it was
    asked = asked_rewards(valid, group, torch.tensor([1.0, 1.0]))
    assert asked.tolist() == [[True] * 6, [False] * 3 + [True] * 3]
    assert judged_samples(valid, asked).tolist() == [True] * 5 + [False]
    assert not judged_samples(valid[1:, :3], asked[1:, :3]).any()  # nothing was asked: nothing is known
    # Samples of several prompts in one group: where a reward does not apply it is neutral, not the worst.
    together = torch.zeros(6, dtype=torch.long)
    neutral = group_advantages(rewards[1:], together, asked=asked[1:])
    assert neutral[:3].eq(0).all() and neutral[5] == neutral.min() < 0


def test_groups_may_be_interleaved_and_named_freely():
    rewards, order = torch.rand(2, 12), torch.randperm(12)
    plain = group_advantages(rewards, GROUP)
    torch.testing.assert_close(group_advantages(rewards[:, order], 7 * GROUP[order] + 3), plain[order])


@given(st.lists(st.floats(-10, 10), min_size=4, max_size=4), st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_advantages_ignore_shift_and_scale(values, scale, shift):
    rewards = torch.tensor([values], dtype=torch.float64)
    group = torch.zeros(4, dtype=torch.long)
    plain = group_advantages(rewards, group, eps=1e-12)
    if rewards.std() > 1e-3:
        torch.testing.assert_close(
            group_advantages(scale * rewards + shift, group, eps=1e-12), plain, rtol=1e-5, atol=1e-5
        )
    assert abs(float(plain.sum())) < 1e-4


def test_equal_rewards_give_exactly_zero():
    assert group_advantages(torch.full((1, 7), 0.1), torch.zeros(7, dtype=torch.long), eps=1e-12).eq(0).all()


def test_clipped_loss_and_gradient_equal_the_public_ones():
    log_prob = peer("F/log_prob_new").clone().requires_grad_()
    result = clipped_policy_loss(log_prob, peer("F/log_prob_old"), peer("F/adv"), clip=1e-3, advantage_clip=5.0)
    result.loss.backward()
    for ours, theirs in ((result.loss, "loss"), (log_prob.grad, "grad"), (result.ratio, "ratio")):
        torch.testing.assert_close(ours, peer(f"F/{theirs}"), rtol=1e-5, atol=1e-6)


def test_clip_stops_the_gradient_only_where_it_would_go_further():
    log_prob = torch.tensor([0.01, 0.01, -0.01, -0.01], requires_grad=True)
    result = clipped_policy_loss(log_prob, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    result.loss.backward()
    assert log_prob.grad.ne(0).tolist() == [False, True, True, False]
    assert result.clipped.tolist() == [True, False, False, True]


def test_kl_equals_torch_distributions():
    torch.manual_seed(0)
    mean, other, std = torch.randn(2, 3, 2), torch.randn(2, 3, 2), torch.tensor(0.3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(other, std)).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_kl(mean, other, std), expected)
    mask = torch.zeros(1, 3, 1, dtype=torch.bool)
    mask[:, 1] = True
    torch.testing.assert_close(gaussian_kl(mean, other, std, mask=mask), gaussian_kl(mean[:, 1:2], other[:, 1:2], std))
