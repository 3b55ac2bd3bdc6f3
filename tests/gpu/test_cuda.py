"""The embedded models on a CUDA device: the same numbers as on the CPU, in bfloat16 close to them, runs that resume.

`VGGRPO_TEST_DEVICE=cpu pytest tests/gpu` runs the tests themselves on a CPU, which shows nothing of a GPU but that the
tests are sound. What times and memory at Wan's sizes are is asked of `benchmarks/full_shape.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vggrpo import assets
from vggrpo.config import load_config
from vggrpo.lgm import LatentGeometryModel
from vggrpo.models.loading import load_geometry_model, load_video_model
from vggrpo.posttraining import train
from vggrpo.rewards import camera_motion_smoothness, geometry_reprojection_consistency
from vggrpo.sampling.generate import solve
from vggrpo.world import sample_batch

DEVICE = os.environ.get("VGGRPO_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = ["The camera orbits left around a red ball.", "A blue box rolls."]
SMALL = [
    "updates=2", "save_every=1", "data.num_prompts=2", "data.num_frames=9", "lora.rank=4", "grpo.prompts_per_update=2",
    "grpo.samples_per_prompt=4", "grpo.base_travel_samples=1", "sampling={num_steps: 4, window: 2}", "stop={}",
]  # fmt: skip


@pytest.fixture(scope="module")
def clips():
    return sample_batch([1, 2], num_frames=9, supersample=1)


def test_worlds_are_the_same(clips):
    there = sample_batch([1, 2], num_frames=9, supersample=1, device=DEVICE)
    assert there.video.device.type == DEVICE
    # A ray at an edge may hit the other side of it.
    assert ((there.depth.cpu() - clips.depth).abs() < 1e-3).float().mean() > 0.999
    torch.testing.assert_close(there.geometry(4).cam2world.cpu(), clips.geometry(4).cam2world, rtol=1e-4, atol=1e-5)


def test_rewards_are_the_same(clips):
    here = clips.geometry(4)
    there = here.to(DEVICE)
    for reward in (camera_motion_smoothness, geometry_reprojection_consistency):
        expected, found = reward(here), reward(there)
        assert found.value.device.type == DEVICE and found.valid.all()
        torch.testing.assert_close(found.value.cpu(), expected.value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["geometry", "judge"])
def test_geometry_models_say_the_same(clips, name):
    network = load_geometry_model(assets.path(name))
    frames = clips.video[:, :, ::4].transpose(1, 2)
    with torch.no_grad():
        here, there = network(frames), network.to(DEVICE)(frames.to(DEVICE))
    torch.testing.assert_close(there.depth.cpu(), here.depth, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(there.cam2world.cpu(), here.cam2world, rtol=2e-3, atol=2e-3)


def test_latents_and_their_geometry_are_the_same(clips):
    here, there = (load_video_model("embedded", device=device) for device in ("cpu", DEVICE))
    lgm = LatentGeometryModel.from_pretrained("embedded")
    with torch.no_grad():
        latents = here.encode_video(clips.video)
        torch.testing.assert_close(there.encode_video(clips.video).cpu(), latents, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(there.decode(latents).cpu(), here.decode(latents), rtol=2e-3, atol=2e-3)
        expected = lgm(latents)
        found = lgm.to(DEVICE)(latents.to(DEVICE))
    torch.testing.assert_close(found.depth.cpu(), expected.depth, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_samples_are_close(dtype, share):
    here, there = load_video_model("embedded", device="cpu"), load_video_model("embedded", device=DEVICE, dtype=dtype)
    options = {
        "shape": here.latent_spec.latent_shape(9, 64, 64),
        "seeds": [0, 1],
        "num_steps": 4,
        "guidance_scale": 3.0,
    }
    with torch.no_grad():
        expected, found = (solve(model, PROMPTS, **options) for model in (here, there))
    assert found.device.type == DEVICE and found.dtype == torch.float32
    assert (found.cpu() - expected).norm() < share * expected.norm()


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-4)])
@pytest.mark.parametrize("batches", ["32", "auto"])
def test_training_starts_at_ratio_one_and_resumes_bit_for_bit(tmp_path, dtype, bound, batches):
    settings = [*SMALL, f"model={{path: embedded, device: {DEVICE}, dtype: {dtype}}}",
                f"sampling.micro_batch={batches}", f"grpo.micro_batch={batches}"]  # fmt: skip

    def run(name: str, updates: int) -> Path:
        config = load_config("tiny", [*settings, f"output={tmp_path / name}", f"updates={updates}"])
        return train(config, progress=False)

    whole = run("whole", 2)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert log[0]["ratio_deviation"] < bound and all(row["grad_norm"] > 0 for row in log)
    run("parts", 1)
    parts = run("parts", 2)
    name = "pytorch_lora_weights.safetensors"
    first, second = load_file(whole / name), load_file(parts / name)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "direct", "nft"])
def test_rivals_run(tmp_path, algorithm):
    of_its_own = {"sft": ["sft.candidates=2"], "dpo": ["dpo.candidates=2", "dpo.pairs=geometry", "dpo.min_gap=0"],
                  "direct": [], "nft": ["nft.samples_per_prompt=2"]}[algorithm]  # fmt: skip
    settings = [f"algorithm={algorithm}", *SMALL, *of_its_own, "updates=1", f"output={tmp_path}"]
    train(load_config("tiny", [*settings, f"model={{path: embedded, device: {DEVICE}}}"]), progress=False)
    (row,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert row["grad_norm"] > 0
