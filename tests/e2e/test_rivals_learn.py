"""Each rival of GRPO, trained for longer, moves what it optimises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fake_lgm import fake_lgm
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from test_posttraining_rivals import PROMPTS, adapter, config_for, rows, run

from vggrpo.errors import UserError
from vggrpo.io.manifest import ManifestRow, write_manifest
from vggrpo.io.video import write_video
from vggrpo.models.wan import WanVideoModel
from vggrpo.posttraining import train
from vggrpo.posttraining.clips import fitted_video

pytestmark = pytest.mark.e2e


def test_sft_learns_the_clips_of_a_manifest(tiny_wan_dir, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        write_video(tmp_path / f"{number}.mp4", torch.rand(3, 14, 40, 48, generator=generator), 8)
    write_manifest(tmp_path / "manifest.jsonl",
                   [ManifestRow(f"{n}.mp4", PROMPTS[n], 0, 8.0, "real") for n in range(3)])  # fmt: skip
    output = tmp_path / "out"
    config = config_for("sft", tiny_wan_dir, output, [f"sft.videos={tmp_path}", "sft.keep=0.6", "updates=12",
                                                      "optim.learning_rate=0.02", "save_every=12"])  # fmt: skip
    train(config, lgm=fake_lgm, progress=False)
    log = rows(output)
    assert log[0]["clips"] == 2 and log[0]["videos"] == 0
    losses = torch.tensor([row["loss"] for row in log])
    assert losses[-4:].mean() < losses[:4].mean()
    stored = load_file(next(iter(sorted((output / "clips").glob("clip-*.safetensors")))))["latents"]
    video = fitted_video(tmp_path / "0.mp4", 13, (32, 32))
    with torch.no_grad():
        expected = WanVideoModel.from_pretrained(tiny_wan_dir).encode_video(video[None])[0]
    torch.testing.assert_close(stored, expected)
    with pytest.raises(UserError, match="no manifest"):
        config = config_for("sft", tiny_wan_dir, tmp_path / "x", ["sft.videos=/nowhere"])
        train(config, lgm=fake_lgm, progress=False)
    with pytest.raises(UserError, match=r"num_frames is 17"):
        fitted_video(tmp_path / "0.mp4", 17, (32, 32))


def test_dpo_comes_to_prefer_the_winners(tiny_wan_dir, tmp_path):
    run("dpo", tiny_wan_dir, tmp_path, "updates=8", "save_every=8", "optim.learning_rate=0.01")
    log = rows(tmp_path)
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # the policy is the reference before the first step
    assert log[-1]["preference_accuracy"] == 1.0 and log[-1]["loss"] < 0.5 and log[-1]["margin"] < 0


def test_direct_training_raises_the_reward(tiny_wan_dir, tmp_path):
    run("direct", tiny_wan_dir, tmp_path, "updates=10", "save_every=10", "optim.learning_rate=0.02", "direct.kl=0",
        "rewards={camera_motion_smoothness: 1}", "direct.samples_per_prompt=4")  # fmt: skip
    values = [row["reward/camera_motion_smoothness"] for row in rows(tmp_path)]
    assert sum(values[-3:]) > sum(values[:3])


def test_the_kl_holds_direct_training_back(tiny_wan_dir, tmp_path):
    for name, kl in (("free", 0.0), ("held", 100.0)):
        run("direct", tiny_wan_dir, tmp_path / name, "updates=6", "save_every=6", "optim.learning_rate=0.02",
            f"direct.kl={kl}")  # fmt: skip
    size = {
        name: sum(v.norm() for k, v in adapter(tmp_path / name).items() if "lora_B" in k) for name in ("free", "held")
    }
    assert size["held"] < size["free"]
    assert rows(tmp_path / "held")[-1]["kl"] > 0 and rows(tmp_path / "free")[-1]["kl"] == 0
