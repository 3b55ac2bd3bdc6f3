"""Latent reward guidance and best of N: the formula, exactly off at 0, uphill, honest about what cannot be judged."""

from __future__ import annotations

import json

import pytest
import torch
from fake_lgm import fake_lgm

from vggrpo.cli import main
from vggrpo.config import load_config
from vggrpo.errors import UserError
from vggrpo.models.lora import attach_lora, export_lora
from vggrpo.models.wan import WanVideoModel
from vggrpo.rewards import camera_motion_smoothness, geometry_reprojection_consistency
from vggrpo.rewards.latent import LatentGeometryReward, WeightedLatentReward
from vggrpo.sampling import RewardGuidance, generate_videos
from vggrpo.sampling.best_of import candidate_seed
from vggrpo.sampling.generate import solve
from vggrpo.sampling.steering import Steering

PROMPTS = ["a red box", "the sphere rolls"]
SHAPE = (4, 4, 2, 2)  # what 13 frames of 16 x 16 pixels are
BOTH = {"camera_motion_smoothness": 1.0, "geometry_reprojection_consistency": 3.0}


def linear(weight: torch.Tensor):
    return lambda latents, prompts: (latents * weight).flatten(1).sum(1)


@pytest.mark.parametrize("detach", [False, True])
def test_the_formula(detach):
    """With v = 3 z and a linear reward the gradient is known: w (1 - 3 t), or w with a detached velocity."""
    generator = torch.Generator().manual_seed(0)
    z, weight = (torch.randn(2, 4, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.5, 0.8], dtype=torch.float64)
    guidance = RewardGuidance(linear(weight), scale=2.0, detach_velocity=detach)
    found = guidance.velocity(lambda state: 3 * state, z, t, PROMPTS)
    time = t.view(-1, 1, 1, 1, 1)
    gradient = weight * (1 if detach else 1 - 3 * time)
    torch.testing.assert_close(found, 3 * z - 2 * time / (1 - time) * gradient)
    assert not found.requires_grad


def test_the_factor_is_clamped_and_the_first_step_is_never_guided():
    guidance = RewardGuidance(linear(torch.ones(1)), scale=1.0, every=2, max_t=0.9, detach_velocity=True)
    z = torch.zeros(1, 4, 1, 2, 2)
    for t, factor in ((1.0, 9.0), (0.95, 9.0), (0.6, 1.5)):
        torch.testing.assert_close(guidance.velocity(torch.zeros_like, z, torch.tensor([t]), PROMPTS),
                                   torch.full_like(z, -factor))  # fmt: skip
    assert [guidance.acts(step) for step in range(5)] == [False, False, True, False, True]
    paper = RewardGuidance(linear(torch.ones(1)), scale=1.0)
    assert [step for step in range(50) if paper.acts(step)] == [20, 40] and paper.guided_steps(50) == 2


def test_what_cannot_be_judged_is_left_alone_and_counted():
    def reward(latents, prompts):
        rows = {"broken": lambda x: x.sum() * torch.nan, "fine": torch.sum, "steep": lambda x: (x - 1).norm().sqrt()}
        return torch.stack([rows[prompt](x) for x, prompt in zip(latents, prompts, strict=True)])

    guidance = RewardGuidance(reward, scale=1.0, detach_velocity=True)
    z, t = torch.ones(3, 4, 1, 2, 2), torch.full((3,), 0.5)
    found = guidance.velocity(torch.zeros_like, z, t, ["broken", "fine", "steep"])
    torch.testing.assert_close(found, torch.tensor([0.0, -1, 0]).view(-1, 1, 1, 1, 1).expand_as(z))
    assert guidance.take_skipped() == 2 and guidance.take_skipped() == 0


def test_guidance_that_guides_no_step_is_refused(tmp_path):
    """Else plain videos would be written under the name of guided ones."""
    guidance = RewardGuidance(linear(torch.ones(1)), scale=100.0)
    with pytest.raises(UserError, match=r"guides none of 20; .*19 or less, such as 8") as caught:
        generate_videos(PROMPTS, tmp_path / "out", steering=Steering(guidance.reward, "test", guidance), num_steps=20)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    for steps in (2, 3, 20):  # what it names works
        named = RewardGuidance(guidance.reward, 1.0, every=max(1, steps * 2 // 5))
        named.check_steps(steps)
        RewardGuidance(guidance.reward, 1.0, every=steps - 1).check_steps(steps)
    guidance.check_steps(21)
    with pytest.raises(UserError, match="2 steps or more"):
        RewardGuidance(guidance.reward, 1.0, every=1).check_steps(1)
    RewardGuidance(guidance.reward, 0.0).check_steps(20)
    with pytest.raises(UserError, match="guides none"):  # from Python, too, before the model is asked anything
        solve(None, PROMPTS, shape=SHAPE, seeds=[1, 2], num_steps=20, guidance=guidance)


@pytest.mark.parametrize("wrong", [{"scale": -1.0}, {"scale": float("nan")}, {"scale": 1.0, "every": 0},
                                   {"scale": 1.0, "max_t": 1.0}])  # fmt: skip
def test_bad_settings(wrong):
    with pytest.raises(UserError):
        RewardGuidance(linear(torch.ones(1)), **wrong)


@pytest.fixture(scope="module")
def model(tiny_wan_dir):
    return WanVideoModel.from_pretrained(tiny_wan_dir)


@pytest.fixture(scope="module")
def lora_dir(tiny_wan_dir, tmp_path_factory):
    tuned = WanVideoModel.from_pretrained(tiny_wan_dir)
    torch.manual_seed(5)
    for parameter in attach_lora(tuned.transformer, rank=2, alpha=4, targets=["to_q"]):
        torch.nn.init.normal_(parameter, std=0.3)
    return export_lora(tuned.transformer, tmp_path_factory.mktemp("lora")).parent


def test_scale_zero_is_plain_sampling_bit_for_bit(model):
    options = {"shape": SHAPE, "seeds": [1, 2], "num_steps": 6, "guidance_scale": 2.0}
    reward = WeightedLatentReward(fake_lgm, BOTH)
    plain = solve(model, PROMPTS, **options)
    off = solve(model, PROMPTS, **options, guidance=RewardGuidance(reward, scale=0.0, every=1))
    assert torch.equal(plain, off)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_guidance_climbs_the_reward_that_it_is_given(model, detach, cfg):
    reward = WeightedLatentReward(fake_lgm, {"camera_motion_smoothness": 1.0})
    options = {"shape": SHAPE, "seeds": [1, 2], "num_steps": 8, "guidance_scale": cfg}
    values = [reward(solve(model, PROMPTS, **options), PROMPTS)]
    for scale in (2.0, 6.0):
        guidance = RewardGuidance(reward, scale=scale, every=2, detach_velocity=detach)
        values.append(reward(solve(model, PROMPTS, **options, guidance=guidance), PROMPTS))
        assert guidance.skipped == 0
    assert (values[1] > values[0]).all() and (values[2] > values[1]).all()


def test_the_weighted_reward_is_the_weighted_mean_and_differentiable():
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prediction = fake_lgm(latents)
    expected = (
        camera_motion_smoothness(prediction).value + 3 * geometry_reprojection_consistency(prediction).value
    ) / 4
    prompts = [*PROMPTS, "x"]
    found = WeightedLatentReward(fake_lgm, BOTH, chunk=2)(latents, prompts)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), latents)
    assert gradient.isfinite().all() and gradient.flatten(1).norm(dim=1).gt(0).all()
    with_prompts = WeightedLatentReward(fake_lgm, {"camera_adherence": 1.0})(latents, ["a dog", "pan left", "zoom in"])
    assert with_prompts.isnan().tolist() == [True, False, False]
    for wrong in ({}, {"camera_adherence": 0.0}, {"camera_adherence": -1.0, "camera_motion_smoothness": 2.0}):
        with pytest.raises(UserError, match="weights"):
            WeightedLatentReward(fake_lgm, wrong)


def test_rewards_take_the_options_that_training_gives_them():
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    options = {"camera_motion_smoothness": {"eps_translation": 0.5, "eps_rotation": 0.5},
               "geometry_reprojection_consistency": {"movers": "none", "worst_views": 1}}  # fmt: skip
    prediction, (motion, geometry) = fake_lgm(latents), options.values()
    expected = (
        camera_motion_smoothness(prediction, **motion).value,
        geometry_reprojection_consistency(prediction, **geometry).value,
    )
    plain, given = LatentGeometryReward(fake_lgm)(latents), LatentGeometryReward(fake_lgm, options=options)(latents)
    for name, value in zip(("motion", "geometry"), expected, strict=True):
        torch.testing.assert_close(given[name], value)
        assert not torch.allclose(given[name], plain[name], rtol=1e-6, atol=0)
    torch.testing.assert_close(WeightedLatentReward(fake_lgm, BOTH, options)(latents, ["a"] * 3),
                               (expected[0] + 3 * expected[1]) / 4)  # fmt: skip
    for build in (lambda o: LatentGeometryReward(fake_lgm, options=o),
                  lambda o: LatentGeometryReward.from_pretrained("nowhere", options=o),
                  lambda o: WeightedLatentReward(fake_lgm, BOTH, o)):  # fmt: skip
        with pytest.raises(UserError, match="the nearest that it has is 'eps_"):
            build({"camera_motion_smoothness": {"eps": 1.0}})
        with pytest.raises(UserError, match="options for 'camera_adherence'"):
            build({"camera_adherence": {}})


def test_the_best_candidate_is_kept_and_the_first_is_the_plain_video():
    def sample(seeds):
        return torch.tensor([float(seed % 1000) for seed in seeds]).view(-1, 1, 1, 1, 1)

    def reward(latents, prompts):
        value = latents.flatten(1)[:, 0]
        return torch.where(
            torch.tensor([prompt == "lost" for prompt in prompts]), torch.full_like(value, torch.nan), value
        )

    steering = Steering(reward, "test", candidates=5)
    best, rewards = steering.sample(sample, [11, 12], ["a", "lost"])
    drawn = sample([candidate_seed(11, k) for k in range(5)]).flatten()
    assert rewards[:, 0].tolist() == drawn.tolist() and drawn[0] == 11
    assert best[0].item() == drawn.max() and best[1].item() == 12  # what nobody can judge stays what it was
    assert rewards[:, 1].isnan().all()
    with pytest.raises(UserError):
        Steering(reward, "test", candidates=0)


def test_videos_are_steered_with_base_and_tuned_weights_and_the_cost_is_stated(tiny_wan_dir, lora_dir, tmp_path):
    reward = WeightedLatentReward(fake_lgm, BOTH)
    options = {"pipeline": tiny_wan_dir, "num_steps": 4, "num_frames": 13, "size": (16, 16), "save_latents": True}
    generate_videos(PROMPTS, tmp_path, **options)
    for lora in (None, lora_dir):
        arm = "plain" if lora is None else "tuned"
        steering = Steering(reward, "both", RewardGuidance(reward, 4.0, every=2), candidates=3)
        generate_videos(PROMPTS, tmp_path, **options, lora=lora, arm=arm, steering=steering, micro_batch=1)
        cost = json.loads((tmp_path / arm / "cost.json").read_text())
        assert cost["videos"] == 2 and cost["seconds_per_video"] > 0
        assert cost["network_passes_per_video"] == 12 and cost["network_gradients_per_video"] == 3
        assert cost["reward_passes_per_video"] == 6 and cost["guided_steps_without_gradient"] == 0
        rows = [json.loads(line) for line in (tmp_path / arm / "candidates.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in rows] == PROMPTS and all(len(row["rewards"]) == 3 for row in rows)
        settings = json.loads((tmp_path / arm / "settings.json").read_text())
        assert settings["guidance"]["scale"] == 4.0 and settings["best_of"]["candidates"] == 3
    plain = json.loads((tmp_path / "base" / "cost.json").read_text())
    assert plain["network_passes_per_video"] == 4 and plain["reward_passes_per_video"] == 0
    with pytest.raises(UserError, match="guidance"):
        generate_videos(PROMPTS, tmp_path, **options, arm="plain")
    # One candidate and scale 0 are plain sampling: the same arm goes on.
    off = Steering(reward, "both", RewardGuidance(reward, 0.0))
    before = (tmp_path / "base" / "cost.json").read_text()
    generate_videos(PROMPTS, tmp_path, **options, steering=off)
    assert (tmp_path / "base" / "cost.json").read_text() == before


def test_the_command_builds_the_steering(tiny_wan_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vggrpo.posttraining.trainer.load_lgm", lambda path, device, spec: fake_lgm)
    (tmp_path / "p.txt").write_text("a red box\n")
    arguments = ["generate", "--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out"), "--device", "cpu",
                 "--pipeline", str(tiny_wan_dir), "--steps", "3", "--frames", "13", "--size", "16"]  # fmt: skip
    steer = ["--guidance", "2", "--guidance-every", "1", "--best-of", "2", "--reward", "camera_motion_smoothness=0.5"]
    assert main([*arguments, *steer]) == 0
    settings = json.loads((tmp_path / "out" / "base-guided-best2" / "settings.json").read_text())
    assert settings["guidance"]["every"] == 1 and "0.5 camera_motion_smoothness" in settings["guidance"]["reward"]
    assert "options" not in settings["guidance"]
    assert main([*arguments, *steer, "--recipe", "tiny"]) == 2  # another reward, so no video may be added to these
    assert "options" in capsys.readouterr().err
    assert main([*arguments, *steer, "--recipe", "tiny", "--arm", "tiny"]) == 0
    settings = json.loads((tmp_path / "out" / "tiny" / "settings.json").read_text())
    used = {"camera_motion_smoothness": load_config("tiny").rewards["camera_motion_smoothness"].options}
    assert settings["guidance"]["options"] == used == settings["best_of"]["options"]
    assert main([*arguments, "--recipe", "tiny"]) == 2 and "--recipe says what to steer by" in capsys.readouterr().err
    for wrong, said in ((["--reward", "smoothness"], "nearest"), (["--reward", "a=b"], "NAME=WEIGHT")):
        assert main([*arguments, "--guidance", "1", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_an_lgm_that_first_judged_can_guide_afterwards():
    """Tables that networks keep must not be inference tensors, whoever asks for them first."""
    from test_lgm import latents, tiny_lgm

    lgm, clip = tiny_lgm(), latents(size=(6, 9))
    with torch.inference_mode():
        lgm(clip)
    reward = WeightedLatentReward(lgm, {"camera_motion_smoothness": 1.0})
    guidance = RewardGuidance(reward, 1.0)
    found = guidance.velocity(torch.zeros_like, clip, torch.full((len(clip),), 0.5), ["a"] * len(clip))
    assert guidance.skipped == 0 and found.isfinite().all() and found.any()
