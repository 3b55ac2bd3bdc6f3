"""A benchmark in short on the embedded models: a LoRA of noise against none."""

from __future__ import annotations

import json

import torch

from vggrpo.cli import main
from vggrpo.config import dump_config, load_config
from vggrpo.models.loading import load_video_model
from vggrpo.models.lora import attach_lora, export_lora


def test_benchmark_in_short(tmp_path):
    model = load_video_model("embedded", device="cpu", load_vae=False, load_text=False)
    torch.manual_seed(0)
    for parameter in attach_lora(model.transformer, rank=2, alpha=4, targets=["to_q"]):
        parameter.data.normal_(0, 0.1)
    lora = export_lora(model.transformer, tmp_path / "lora").parent
    # As in the directory of a training run.
    (tmp_path / "config.yaml").write_text(dump_config(load_config("tiny")))
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps({"update": n, "reward/mine": 0.1 * n}) + "\n" for n in (0, 1))
    )
    overrides = [f"output={tmp_path / 'run'}", f"tuned_lora={lora}", "limit=2", "seeds=[0]", "sampling.num_steps=2"]
    overrides.append("reference=null")  # rendering the reference is what costs, and the demo's test has it
    assert main(["benchmark", "benchmark-tiny", *overrides]) == 0
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert {"epipolar_inliers", "judge_reprojection", "motion_reward", "geometry_reward"} <= set(metrics)
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "the LGM embedded, from latents" in page and "guidance_scale" in page
    assert "reward/mine" in page and "spearman_judge" in page  # training curves, and the audit of the LGM
    videos = {video: video.stat().st_mtime_ns for video in (tmp_path / "run").rglob("*.mp4")}
    assert len(videos) == 8
    assert main(["benchmark", "benchmark-tiny", *overrides]) == 0
    assert {video: video.stat().st_mtime_ns for video in videos} == videos
