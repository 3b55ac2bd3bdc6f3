"""Image to video with Wan2.2-TI2V's kind of pipeline: the first latent frame is given, and nothing acts on it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from fake_lgm import fake_lgm
from tiny_wan import save_tiny_wan

from vggrpo.config import load_config
from vggrpo.errors import UserError
from vggrpo.io.images import read_image, read_image_list
from vggrpo.io.manifest import read_jsonl
from vggrpo.models.wan import WanVideoModel
from vggrpo.posttraining import train
from vggrpo.sampling import generate_videos, rollout
from vggrpo.sampling.first_frame import frame_times
from vggrpo.sampling.generate import solve

SHAPE = (4, 3, 2, 4)


@pytest.fixture(scope="module")
def ti2v_dir(tmp_path_factory):
    return save_tiny_wan(tmp_path_factory.mktemp("ti2v"), ti2v=True, solver="unipc")


@pytest.fixture(scope="module")
def model(ti2v_dir):
    return WanVideoModel.from_pretrained(ti2v_dir)


@pytest.fixture
def images(tmp_path):
    """Two images and the list that names them."""
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (40 + 8 * i, 90, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.png"), pixels)
    (tmp_path / "images.txt").write_text("0.png\n1.png\n")
    return tmp_path / "images.txt"


def test_the_pipeline_has_the_larger_stride(model):
    assert model.latent_spec.spatial_stride == 16 and model.frame_times
    with torch.no_grad():
        assert model.encode_video(torch.rand(1, 3, 9, 32, 64)).shape == (1, *SHAPE)


def test_one_time_equals_the_same_time_for_every_frame(model):
    torch.manual_seed(0)
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        text, t = model.encode_prompt(["a red box", ""]), torch.tensor([0.3, 0.8])
        torch.testing.assert_close(
            model.predict_velocity(x, t, text), model.predict_velocity(x, t[:, None].repeat(1, 3), text)
        )
        pinned = model.predict_velocity(x, frame_times(t, 3), text)
    assert not torch.allclose(pinned, model.predict_velocity(x, t, text), atol=1e-4)


def test_equals_the_image_pipeline_of_diffusers(ti2v_dir, model):
    """Same noise, same image, same solver: the latents of `WanImageToVideoPipeline`."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    base = WanPipeline.from_pretrained(str(ti2v_dir))
    pipe = WanImageToVideoPipeline(**base.components, image_processor=None, image_encoder=None, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(3))
    theirs = pipe(
        image=image[None], prompt="a red box", height=32, width=64, num_frames=9, num_inference_steps=4,
        guidance_scale=1.0, generator=torch.Generator().manual_seed(7), output_type="latent",
    ).frames  # fmt: skip
    with torch.no_grad():
        first = model.encode_video(image[None, :, None])
    ours = solve(model, ["a red box"], shape=SHAPE, seeds=[7], num_steps=4, first_frame=first)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_rollout_holds_the_first_frame_and_leaves_it_out(model):
    first = torch.randn(2, 4, 1, 2, 4)
    with torch.no_grad():
        text = model.encode_prompt(["a red box", "blue"])
    kept = rollout(
        model, text, shape=SHAPE, noise_seeds=(1, 2), step_seeds=(3, 4), sigmas=model.sigmas(5), sde_steps=(1, 2),
        first_frame=first,
    )  # fmt: skip
    for states in (*kept.samples, *kept.next_samples, kept.latents):
        assert torch.equal(states[:, :, :1], first)
    other = rollout(
        model, text, shape=SHAPE, noise_seeds=(1, 2), step_seeds=(3, 4), sigmas=model.sigmas(5), sde_steps=(1, 2),
        first_frame=first + 1,
    )  # fmt: skip
    assert not torch.allclose(kept.latents[:, :, 1:], other.latents[:, :, 1:], atol=1e-3)


def test_training_from_images(ti2v_dir, images, tmp_path):
    config = load_config(
        {
            "output": str(tmp_path / "run"), "updates": 2, "save_every": 1, "model": {"path": str(ti2v_dir)},
            "data": {"num_frames": 13, "height": 32, "width": 64, "first_frames": str(images)},
            "sampling": {"num_steps": 4, "window": 2}, "lora": {"rank": 2},
            "grpo": {"prompts_per_update": 2, "samples_per_prompt": 4, "micro_batch": 5},
        }
    )  # fmt: skip
    seen = []

    def lgm(latents):
        seen.append(latents[:, :, 0])
        return fake_lgm(latents)

    train(config, lgm=lgm, prompts=["a red box", "the sphere rolls"], progress=False)
    log = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert all(row["ratio_deviation"] < 1e-5 and row["grad_norm"] > 0 for row in log)
    assert len(torch.unique(torch.cat(seen), dim=0)) == 2  # every clip starts with one of the two images


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo", "nft", "direct"])
def test_algorithms_leave_the_given_frame_alone(ti2v_dir, images, tmp_path, monkeypatch, caplog, algorithm):
    """In every call of the network it is clean and at time 0; what the network says there carries no gradient."""
    config = load_config(
        {
            "algorithm": algorithm, "output": str(tmp_path / "run"), "updates": 2, "save_every": 2,
            "model": {"path": str(ti2v_dir)}, "lora": {"rank": 2}, "sampling": {"num_steps": 3, "window": 1},
            "data": {"num_frames": 13, "height": 32, "width": 64, "first_frames": str(images)},
            "grpo": {"prompts_per_update": 2, "samples_per_prompt": 3},
            "sft": {"candidates": 2, "keep": 0.5, "batch": 2},
            "dpo": {"pairs": "latent", "min_gap": 0, "candidates": 3},
            "nft": {"prompts_per_update": 2, "samples_per_prompt": 3, "times": 2},
            "direct": {"prompts_per_update": 2, "grad_steps": 2},
        }
    )  # fmt: skip
    states, times, gradients = [], [], []
    plain = WanVideoModel.predict_velocity

    def noted(self, latents, t, text):
        velocity = plain(self, latents, t, text)
        states.append(latents.detach()[:, :, 0])
        times.append(t)
        if velocity.requires_grad:
            velocity.register_hook(lambda gradient: gradients.append(gradient))
        return velocity

    monkeypatch.setattr(WanVideoModel, "predict_velocity", noted)
    train(config, lgm=fake_lgm, prompts=["a red box", "the sphere rolls"], progress=False)
    log = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert all(row["grad_norm"] > 0 for row in log)
    assert len(torch.unique(torch.cat(states), dim=0)) == 2
    assert all(t.ndim == 2 and not t[:, 0].any() and (t[:, 1:] == t[:, 1:2]).all() for t in times)
    assert all(float(t[:, 1].min()) > 0 for t in times)
    assert gradients and all(not g[:, :, 0].any() and g[:, :, 1:].any() for g in gradients)
    assert "recomputed" not in caplog.text  # GRPO's roll-out and replay count the same frames


def test_validation_continues_its_own_images(ti2v_dir, images, tmp_path):
    """One of two validation prompts, with its image: all clips of every validation begin with it."""
    fixed = tmp_path / "fixed.txt"
    fixed.write_text("a green box\nnothing moves\n")
    turned = images.with_name("turned.txt")
    turned.write_text("\n".join(reversed(images.read_text().split())))
    values = {
        "output": str(tmp_path / "run"), "updates": 1, "model": {"path": str(ti2v_dir)}, "lora": {"rank": 2},
        "data": {"num_frames": 13, "height": 32, "width": 64, "first_frames": str(images)},
        "sampling": {"num_steps": 3, "window": 1, "window_last": None},
        "grpo": {"prompts_per_update": 1, "samples_per_prompt": 3},
        "validation": {"every": 1, "prompts": str(fixed), "first_frames": str(turned), "num_prompts": 1,
                       "num_steps": 2, "videos": 1},
    }  # fmt: skip
    seen = []

    def lgm(latents):
        seen.append(latents[:, :, 0])
        return fake_lgm(latents)

    train(load_config(values), lgm=lgm, prompts=["a red box", "the sphere rolls"], progress=False)
    assert len(read_jsonl(tmp_path / "run" / "validation.jsonl")) == 2
    model = WanVideoModel.from_pretrained(ti2v_dir)
    second = read_image(read_image_list(images, 2)[1], (32, 64))  # what `turned` gives to the first prompt
    given = model.encode_video(second[None, :, None])[:, :, 0]
    validated = [first for first in seen if len(first) == 1]  # base model, before, after
    assert len(validated) == 3 and all(torch.equal(first, given) for first in validated)
    del values["validation"]["first_frames"]
    with pytest.raises(UserError, match="go together"):
        load_config(values)
    values["validation"]["first_frames"], values["output"] = str(images), str(tmp_path / "other")
    fixed.write_text("one\ntwo\nthree\n")
    with pytest.raises(UserError, match="2 images for 3 prompts"):
        train(load_config(values), lgm=lgm, prompts=["a red box", "the sphere rolls"], progress=False)


def test_a_model_without_a_time_per_frame_is_refused(tiny_wan_dir, images, tmp_path):
    data = {"num_frames": 13, "height": 32, "width": 64, "first_frames": str(images)}
    config = load_config(
        {"algorithm": "sft", "output": str(tmp_path / "run"), "model": {"path": str(tiny_wan_dir)}, "data": data}
    )
    with pytest.raises(UserError, match="a time per frame"):
        train(config, lgm=fake_lgm, prompts=["a red box", "the sphere rolls"], progress=False)


def test_generate_starts_from_images(ti2v_dir, images, tmp_path):
    files = read_image_list(images, 2)
    options = {"pipeline": ti2v_dir, "num_steps": 2, "num_frames": 5, "size": (32, 64), "save_latents": True}
    generate_videos(["a red box", "blue"], tmp_path / "out", first_frames=files, **options)
    assert len(list((tmp_path / "out" / "base").glob("*.mp4"))) == 2
    with pytest.raises(UserError, match="first_frames"):
        generate_videos(["a red box", "blue"], tmp_path / "out", **options)


def test_images_are_scaled_to_cover_and_cut(images):
    image = read_image(images.parent / "0.png", (32, 64))
    assert image.shape == (3, 32, 64) and image.min() >= 0 and image.max() <= 1


def test_bad_images_are_user_errors(images, tiny_wan_dir, tmp_path):
    with pytest.raises(UserError, match="2 images for 3 prompts"):
        read_image_list(images, 3)
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(UserError, match="no image"):
        read_image(tmp_path / "bad.png", (32, 64))
    model = WanVideoModel.from_pretrained(tiny_wan_dir)
    with pytest.raises(UserError, match="TI2V"):
        model.predict_velocity(torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 2), torch.zeros(1, 512, 16))
