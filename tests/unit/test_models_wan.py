"""`WanVideoModel` against the plain diffusers pipeline that it wraps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vggrpo.errors import UserError
from vggrpo.models.base import LatentSpec, VideoModel
from vggrpo.models.loading import load_video_model
from vggrpo.models.wan import WanVideoModel, read_latent_spec

PROMPTS = ["a red sphere rolls", "", "zyzzyva 龙 the box", "the camera orbits left " * 200]


@pytest.fixture(scope="module")
def model(tiny_wan_dir):
    return WanVideoModel.from_pretrained(tiny_wan_dir)


@pytest.fixture(scope="module")
def pipeline(tiny_wan_dir):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(str(tiny_wan_dir))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_satisfies_the_protocol(model):
    assert isinstance(model, VideoModel)
    assert not any(p.requires_grad for p in model.transformer.parameters())


def test_prompts_are_encoded_as_diffusers_does(model, pipeline):
    with torch.no_grad():
        ours = model.encode_prompt(PROMPTS)
        theirs, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    assert ours.shape == (4, 512, 16)
    torch.testing.assert_close(ours, theirs)
    assert ours[0, 6:].eq(0).all() and ours[3].ne(0).any(dim=-1).all()


def test_velocity_equals_the_plain_transformer(model, pipeline):
    torch.manual_seed(1)
    latents = torch.randn(2, 4, 2, 4, 6)
    with torch.no_grad():
        text = model.encode_prompt(PROMPTS[:2])
        ours = model.predict_velocity(latents, torch.tensor([0.3, 0.9]), text)
        theirs = pipeline.transformer(latents, torch.tensor([300.0, 900.0]), text, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_latents_are_normalised_and_decode_as_diffusers_does(model, pipeline):
    torch.manual_seed(2)
    video = torch.rand(1, 3, 5, 16, 16)
    with torch.no_grad():
        latents = model.encode_video(video)
        raw = pipeline.vae.encode(video * 2 - 1).latent_dist.mode()
        decoded = model.decode(latents)
    mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(latents, (raw - mean) / std)
    assert decoded.shape == video.shape and decoded.min() >= 0 and decoded.max() <= 1


def test_sigmas_run_from_noise_to_data(model):
    sigmas = model.sigmas(10)
    assert sigmas.shape == (11,) and sigmas[0] == 1 and sigmas[-1] == 0 and sigmas.diff().lt(0).all()
    torch.testing.assert_close(sigmas[5], torch.tensor(3 * 0.5 / (1 + 2 * 0.5)))
    torch.testing.assert_close(model.sigmas(4, shift=1.0), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


@pytest.mark.parametrize(("frames", "height", "width"), [(16, 64, 64), (17, 60, 64), (17, 64, 8), (0, 64, 64)])
def test_impossible_sizes_name_the_nearest(frames, height, width):
    with pytest.raises(UserError, match="nearest"):
        LatentSpec(16).latent_shape(frames, height, width)


def test_latent_shape():
    assert LatentSpec(16).latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert LatentSpec(48, spatial_stride=16).latent_shape(121, 704, 1280) == (48, 31, 44, 80)
    assert LatentSpec(16).num_frames(21) == 81


def test_the_latents_are_read_off_the_configs(tiny_wan_dir):
    assert read_latent_spec(tiny_wan_dir) == WanVideoModel.from_pretrained(tiny_wan_dir).latent_spec


def test_weights_that_a_file_lacks_are_one_line(tiny_wan_dir, tmp_path, capfd):
    for part, remove in (("transformer", "proj_out.bias"), ("vae", "decoder.conv_in.bias")):
        copy = Path(shutil.copytree(tiny_wan_dir, tmp_path / part))
        file = copy / part / "diffusion_pytorch_model.safetensors"
        save_file({name: value for name, value in load_file(file).items() if name != remove}, file)
        with pytest.raises(UserError, match=f"cannot load {part} .*1 missing .{remove}"):
            WanVideoModel.from_pretrained(copy)
    (copy / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="holds no object"):
        WanVideoModel.from_pretrained(copy)
    with pytest.raises(UserError, match="no such directory"):
        WanVideoModel.from_pretrained(tmp_path / "none")
    assert "not initialized" not in capfd.readouterr().err


def test_a_name_that_is_no_directory_is_asked_of_the_hub(tiny_wan_dir, monkeypatch):
    """Every part of it, by diffusers and transformers, which look in their cache and download."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    hub_id, asked = "some-lab/Wan-tiny", []

    def answer_for_the_hub(owner, method):
        plain = getattr(owner, method).__func__

        def loaded(cls, name, *arguments, **options):
            if name == hub_id:
                asked.append(options.get("subfolder", "model_index.json"))
                name = str(tiny_wan_dir)
            return plain(cls, name, *arguments, **options)

        monkeypatch.setattr(owner, method, classmethod(loaded))

    for owner in (WanPipeline, AutoencoderKLWan):
        answer_for_the_hub(owner, "load_config")
    euler = FlowMatchEulerDiscreteScheduler
    for owner in (WanTransformer3DModel, AutoencoderKLWan, UMT5EncoderModel, AutoTokenizer, euler):
        answer_for_the_hub(owner, "from_pretrained")
    model = load_video_model(hub_id, device="cpu")
    parts = {"model_index.json", "transformer", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert set(asked) == parts and model.latent_spec == read_latent_spec(tiny_wan_dir)
    for name in ("wan", str(tiny_wan_dir / "none")):
        with pytest.raises(UserError, match="no such directory"):
            load_video_model(name, device="cpu")


def test_broken_directories_are_user_errors(tiny_wan_dir, tmp_path):
    with pytest.raises(UserError, match="model_index"):
        WanVideoModel.from_pretrained(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_wan_dir, broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load transformer"):
        WanVideoModel.from_pretrained(broken)
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.875}))
    with pytest.raises(UserError, match="two experts"):
        WanVideoModel.from_pretrained(broken)
