"""What GRPO's replay trains and what it leaves alone: the KL pulls, flat groups and a given frame do not, and what a
group shares is computed once."""

from __future__ import annotations

import pytest
import torch
from test_posttraining_memory import CPU, PROMPTS, grpo_of
from tiny_wan import save_tiny_wan

from vggrpo.posttraining.replay import OldPolicy, Replayer, all_transitions
from vggrpo.posttraining.scoring import Scores
from vggrpo.sampling import rollout
from vggrpo.tracking import Stopwatch


def rolled_out(grpo):
    """Two groups of four videos, their texts, and all their transitions."""
    prompts = [PROMPTS[i // 4] for i in range(8)]
    text = grpo._encode(prompts)
    return grpo._rollout(0, range(8), prompts, text, (1, 2)), text, all_transitions(torch.arange(8), 2)


def scored_again(grpo, *transitions):
    """The steps under the policy, and their means under the reference."""
    with torch.no_grad(), grpo.policy.reference():
        reference = grpo.replayer.step(*transitions).mean
    return grpo.replayer.step(*transitions), reference


def test_the_kl_pulls_with_the_gradient_of_its_formula(tiny_wan_dir, tmp_path):
    """Under advantages of 0, so that nothing else does."""
    grpo = grpo_of(tiny_wan_dir, tmp_path, "grpo.kl=1")
    trajectory, text, chosen = rolled_out(grpo)
    old = OldPolicy.of(trajectory, chosen)
    grpo.replayer.backward(trajectory, text, chosen, old, torch.zeros(8), len(chosen))
    ours = torch.cat([parameter.grad.flatten() for parameter in grpo.policy.parameters])
    step, reference = scored_again(grpo, trajectory, text, chosen)
    kl = ((step.mean - reference) ** 2 / (2 * step.std**2)).mean()
    expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(kl, grpo.policy.parameters)])
    assert expected.norm() > 0 and (ours - expected).norm() < 1e-4 * expected.norm()


def test_a_given_frame_is_neither_scored_nor_pulled(tmp_path):
    """Log-probability and KL are means over the other frames, written out."""
    grpo = grpo_of(save_tiny_wan(tmp_path / "ti2v", ti2v=True), tmp_path / "run", "data.width=64", "grpo.kl=1")
    text, chosen = grpo._encode(PROMPTS[:2]), all_transitions(torch.arange(2), 2)
    trajectory = rollout(
        grpo.model, text, shape=grpo.shape, noise_seeds=(1, 2), step_seeds=(3, 4), sigmas=grpo.sigmas,
        sde_steps=(1, 2), noise=grpo.noise, first_frame=torch.ones(2, 4, 1, 2, 4),
    )  # fmt: skip
    old = OldPolicy.of(trajectory, chosen)
    statistics = grpo.replayer.backward(trajectory, text, chosen, old, torch.zeros(2), len(chosen))
    step, reference = scored_again(grpo, trajectory, text, chosen)
    log_prob = torch.distributions.Normal(step.mean, step.std).log_prob(step.next_sample)
    torch.testing.assert_close(old.log_probs, log_prob[:, :, 1:].flatten(1).mean(1))
    assert float(statistics.deviation) < 1e-5
    kl = ((step.mean - reference) ** 2 / (2 * step.std**2))[:, :, 1:].mean().detach()
    assert kl > 0 and float(statistics.sums["kl"]) / len(chosen) == pytest.approx(float(kl), rel=1e-4)


def test_a_flat_group_is_not_replayed(tiny_wan_dir, tmp_path, monkeypatch):
    grpo = grpo_of(tiny_wan_dir, tmp_path)
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 2.0, 4.0]).expand(3, 8)
    watched = dict.fromkeys(("camera_travel", "dynamic_share", "subject_share"), values[0])
    monkeypatch.setattr(grpo, "_score", lambda *_: Scores(values, torch.ones_like(values) > 0, watched))
    backward, replayed, totals = Replayer.backward, [], []

    def noted(self, trajectory, text, chosen, old, advantages, total, filler):
        replayed.extend(chosen.tolist())
        totals.append(total)
        return backward(self, trajectory, text, chosen, old, advantages, total, filler)

    monkeypatch.setattr(Replayer, "backward", noted)
    metrics = grpo.update(0, Stopwatch(CPU))
    assert sorted(replayed) == all_transitions(torch.arange(4, 8), 2).tolist() and sum(totals) == len(replayed)
    assert metrics["groups/skipped"] == 1 and metrics["grad_norm"] > 0


@pytest.mark.parametrize(("shared", "sharded", "before"), [(True, False, 2), (False, False, 8), (True, True, 8)])
def test_what_comes_before_the_window_is_computed_once_a_group(
    tiny_wan_dir, tmp_path, monkeypatch, shared, sharded, before
):
    """But for split weights, where every process must call the network equally often."""
    grpo = grpo_of(tiny_wan_dir, tmp_path, f"sampling.shared_noise={shared}")
    grpo.policy.sharded = sharded
    sizes, predict = [], grpo.model.predict_velocity
    monkeypatch.setattr(grpo.model, "predict_velocity", lambda x, t, y: sizes.append(len(x)) or predict(x, t, y))
    rolled_out(grpo)
    assert sum(sizes) == before + 3 * 8  # one step before the window, two in it, one after it
