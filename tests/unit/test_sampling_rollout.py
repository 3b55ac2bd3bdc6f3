"""Roll-outs: replayable, independent of batching, shared work shared."""

from __future__ import annotations

import pytest
import torch
from pretend_device import DeviceTensor, pretended_device

from vggrpo.errors import UserError
from vggrpo.models.wan import WanVideoModel
from vggrpo.sampling import NoiseSettings, choose_window, derive_seed, ode_sample, rollout, sde_step, seeded_noise

SHAPE = (4, 2, 4, 4)


@pytest.fixture(scope="module")
def model(tiny_wan_dir):
    return WanVideoModel.from_pretrained(tiny_wan_dir)


@pytest.fixture(scope="module")
def text(model):
    with torch.no_grad():
        return model.encode_prompt(["a red box", "the sphere", "a red box"])


def run(model, text, noise_seeds=(1, 2, 3), step_seeds=(4, 5, 6), **options):
    arguments = {"sigmas": model.sigmas(5), "sde_steps": (1, 2), "shape": SHAPE} | options
    return rollout(model, text, noise_seeds=noise_seeds, step_seeds=step_seeds, **arguments)


def test_the_kept_steps_are_the_steps_that_were_taken(model, text):
    trajectory = run(model, text)
    assert trajectory.steps == (1, 2) and trajectory.log_probs.shape == (3, 2)
    assert trajectory.samples[1] is trajectory.next_samples[0]
    for w, i in enumerate(trajectory.steps):
        t = trajectory.sigmas[i].expand(3)
        with torch.no_grad():
            velocity = model.predict_velocity(trajectory.samples[w], t, text)
        noise = seeded_noise([derive_seed(seed, i) for seed in (4, 5, 6)], SHAPE)
        step = sde_step(trajectory.samples[w], velocity, t, trajectory.sigmas[i + 1], noise_level=0.7, noise=noise)
        torch.testing.assert_close(step.next_sample, trajectory.next_samples[w])
        torch.testing.assert_close(step.log_prob, trajectory.log_probs[:, w])


def test_repeats_bit_for_bit_and_batching_changes_rounding_only(model, text):
    first, second = run(model, text), run(model, text)
    assert torch.equal(first.latents, second.latents)
    torch.testing.assert_close(run(model, text, micro_batch=2).latents, first.latents, rtol=1e-4, atol=1e-5)
    alone = run(model, text[1:2], (2,), (5,))
    torch.testing.assert_close(alone.latents, first.latents[1:2], rtol=1e-4, atol=1e-5)


def test_samples_of_one_noise_share_the_steps_before_the_window(model, text, monkeypatch):
    sizes = []
    predict = model.predict_velocity
    monkeypatch.setattr(model, "predict_velocity", lambda x, t, y: sizes.append(len(x)) or predict(x, t, y))
    options = {"noise_seeds": (1, 2, 1), "sde_steps": (2, 3)}
    shared = run(model, text, prompt_ids=(0, 1, 0), **options)
    assert sizes == [2, 2, 3, 3, 3]
    torch.testing.assert_close(shared.latents, run(model, text, **options).latents, rtol=1e-4, atol=1e-5)
    assert not torch.equal(shared.latents[0], shared.latents[2])  # the stochastic steps part them


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_states_lie_in_the_cpus_memory(tiny_wan_dir, model, text, offload):
    there = WanVideoModel.from_pretrained(tiny_wan_dir, load_vae=False, load_text=False)
    with pretended_device() as device:
        there.transformer.to(device)
        kept = run(there, text.to(device), offload=offload, keep_means=True)
    states = (*kept.samples, *kept.next_samples, *kept.means)
    assert len(states) == 6 and all(isinstance(state, DeviceTensor) != offload for state in states)
    assert isinstance(kept.latents, DeviceTensor)  # what goes to the LGM stays where it is
    torch.testing.assert_close(kept.latents.host, run(model, text).latents, rtol=1e-4, atol=1e-5)


def test_without_stochastic_steps_it_is_the_ode(model, text):
    ode = ode_sample(model, text, shape=SHAPE, seeds=(1, 2, 3), num_steps=5)
    assert torch.equal(ode, run(model, text, sde_steps=()).latents)
    quiet = run(model, text, noise=NoiseSettings(noise_level=1e-6))
    torch.testing.assert_close(quiet.latents, ode, rtol=1e-3, atol=1e-3)


def test_guidance(model, text):
    with torch.no_grad():
        negative = model.encode_prompt([""])
    guided = run(model, text, guidance_scale=3.0, negative_text=negative)
    assert not torch.allclose(guided.latents, run(model, text).latents)
    with pytest.raises(UserError, match="negative"):
        run(model, text, guidance_scale=3.0)


def test_windows():
    for seed in range(20):
        window = choose_window(8, 3, seed=seed)
        assert window == tuple(range(window[0], window[0] + 3)) and window[-1] <= 6
        scattered = choose_window(8, 3, kind="random", first=1, last=5, seed=seed)
        assert len(set(scattered)) == 3 and min(scattered) >= 1 and max(scattered) <= 5
    assert {choose_window(8, 3, seed=seed)[0] for seed in range(50)} == {0, 1, 2, 3, 4}
    with pytest.raises(UserError, match="window"):
        choose_window(4, 4)
