"""`generate_videos`: same frames as plain diffusers, resumable, base and tuned pairs; LoRA in diffusers' format."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_wan import save_tiny_wan

from vggrpo.errors import UserError
from vggrpo.io.manifest import read_manifest
from vggrpo.models.lora import attach_lora, export_lora, load_lora, lora_disabled
from vggrpo.models.wan import WanVideoModel
from vggrpo.sampling import generate_videos
from vggrpo.sampling.generate import solve, video_seed

PROMPTS = ["a red box", "", "the camera orbits left " * 120]
SIZES = {"num_steps": 3, "num_frames": 5, "size": (16, 32)}


@pytest.fixture(scope="module", params=["euler", "unipc"])
def pipeline_dir(request, tmp_path_factory):
    options = {"solver": request.param, "expand_timesteps": request.param == "unipc"}
    return save_tiny_wan(tmp_path_factory.mktemp(request.param), seed=3, **options)


@pytest.fixture(scope="module")
def lora_dir(pipeline_dir, tmp_path_factory):
    """A LoRA that changes something: B redrawn."""
    model = WanVideoModel.from_pretrained(pipeline_dir)
    parameters = attach_lora(model.transformer, rank=2, alpha=6, targets=["to_q", "to_v"])
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.3)
    return export_lora(model.transformer, tmp_path_factory.mktemp("lora")).parent


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_equals_plain_diffusers_with_the_lora(pipeline_dir, lora_dir, guidance):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(str(pipeline_dir))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(lora_dir))
    options = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": guidance}
    theirs = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(7), output_type="latent", **options).frames
    model = WanVideoModel.from_pretrained(pipeline_dir)
    arguments = {"shape": (4, 2, 2, 4), "seeds": [7], "num_steps": 4, "guidance_scale": guidance}
    base = solve(model, PROMPTS[:1], **arguments)
    load_lora(model.transformer, lora_dir)
    ours = solve(model, PROMPTS[:1], **arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours, base, atol=1e-2)
    with lora_disabled(model.transformer):
        assert torch.equal(solve(model, PROMPTS[:1], **arguments), base)


def test_frames_equal_those_of_plain_diffusers_with_the_lora(pipeline_dir, lora_dir):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(str(pipeline_dir))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(lora_dir))
    theirs = pipe(
        PROMPTS[0], generator=torch.Generator().manual_seed(video_seed(0, 0)), output_type="pt", height=16, width=32,
        num_frames=5, num_inference_steps=3, guidance_scale=1.0,
    ).frames  # (B, T, 3, H, W)  # fmt: skip
    model = WanVideoModel.from_pretrained(pipeline_dir)
    load_lora(model.transformer, lora_dir)
    latents = solve(model, PROMPTS[:1], shape=(4, 2, 2, 4), seeds=[video_seed(0, 0)], num_steps=3)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(latents).transpose(1, 2), theirs, rtol=0, atol=1 / 255)


def test_generated_latents_equal_those_of_plain_diffusers_with_the_lora(pipeline_dir, lora_dir, tmp_path):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(str(pipeline_dir))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(lora_dir))
    theirs = pipe(
        PROMPTS[0], generator=torch.Generator().manual_seed(video_seed(0, 0)), output_type="latent", height=16,
        width=32, num_frames=5, num_inference_steps=3, guidance_scale=1.0,
    ).frames[0]  # fmt: skip
    for lora in (lora_dir, None):
        generate_videos(PROMPTS[:1], tmp_path, pipeline=pipeline_dir, lora=lora, save_latents=True, **SIZES)
    tuned, base = (load_file(next((tmp_path / arm).glob("*.safetensors")))["latents"] for arm in ("tuned", "base"))
    torch.testing.assert_close(tuned, theirs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(base, theirs, atol=1e-2)


def test_arms_are_pairs_and_finished_files_are_kept(tiny_wan_dir, tmp_path):
    options = {"pipeline": tiny_wan_dir, "seeds": (0, 1), "micro_batch": 4, "save_latents": True} | SIZES
    manifest = generate_videos(PROMPTS, tmp_path, **options)
    rows = read_manifest(manifest)
    assert [(row.prompt, row.seed, row.arm) for row in rows] == [(p, s, "base") for p in PROMPTS for s in (0, 1)]
    files = {row.path: (tmp_path / row.path).stat().st_mtime_ns for row in rows}
    latents = load_file((tmp_path / rows[0].path).with_suffix(".safetensors"))["latents"]
    model = WanVideoModel.from_pretrained(tiny_wan_dir)
    expected = solve(model, PROMPTS[:1], shape=(4, 2, 2, 4), seeds=[video_seed(0, 0)], num_steps=3)[0]
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-4)
    (tmp_path / rows[2].path).unlink()
    assert read_manifest(generate_videos(PROMPTS, tmp_path, **options)) == rows
    again = {row.path: (tmp_path / row.path).stat().st_mtime_ns for row in rows}
    assert [path for path in files if files[path] != again[path]] == [rows[2].path]
    assert len(read_manifest(generate_videos(PROMPTS, tmp_path, **options, arm="other"))) == 12


def test_bad_input(tiny_wan_dir, lora_dir, tmp_path):
    options = {"pipeline": tiny_wan_dir} | SIZES
    with pytest.raises(UserError, match="prompt"):
        generate_videos([], tmp_path, **options)
    with pytest.raises(UserError, match=r"4n\+1"):
        generate_videos(PROMPTS, tmp_path / "a", **options | {"num_frames": 6})
    assert generate_videos(PROMPTS[:1], tmp_path / "a", **options).is_file()  # what failed does not bind what follows
    for arm in ("../a", "..", "/a"):
        with pytest.raises(UserError, match="no name of a directory"):
            generate_videos(PROMPTS[:1], tmp_path / "a", arm=arm, **options)
    with pytest.raises(UserError, match="no LoRA"):
        generate_videos(PROMPTS, tmp_path / "b", lora=tmp_path / "none", **options)
    other = WanVideoModel.from_pretrained(save_tiny_wan(tmp_path / "wide", width=48))
    with pytest.raises(UserError, match="does not load"):
        load_lora(other.transformer, lora_dir)
    generate_videos(PROMPTS[:1], tmp_path / "c", **options)
    with pytest.raises(UserError, match="num_steps"):
        generate_videos(PROMPTS[:1], tmp_path / "c", **options | {"num_steps": 4})
