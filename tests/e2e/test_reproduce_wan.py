"""`vggrpo reproduce main` with a pipeline, an LGM and prompts of the user's own: random weights, smallest sizes."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from vggrpo.cli import main
from vggrpo.lgm import LatentGeometryModel, LGMConfig
from vggrpo.models.loading import latent_spec
from vggrpo.models.vggt import VGGT, VGGTConfig

pytestmark = pytest.mark.e2e
ARMS = ["sft", "vggrpo", "nft", "direct"]  # noise has no matches that could make epipolar pairs


@pytest.fixture
def recipe(tiny_wan_dir, tmp_path):
    torch.manual_seed(0)
    geometry = VGGT(VGGTConfig(dim=32, heads=2, conv_layers=1, pairs=2, hooks=(1, 2), head_features=8)).eval()
    torch.nn.init.normal_(geometry.camera_head[-1].weight, std=0.1)
    spec = latent_spec(tiny_wan_dir)
    config = LGMConfig(geometry="../vggt", vae="tiny", latent_channels=spec.channels, layer=1, lora_rank=4)
    lgm = LatentGeometryModel(config, geometry)
    geometry.save_pretrained(tmp_path / "vggt")
    lgm.add_lora()
    lgm.save_pretrained(tmp_path / "lgm")
    (tmp_path / "prompts.txt").write_text("a red sphere rolls\n\nthe camera orbits left\na blue box\n")
    values = {
        "output": "runs/own", "model": {"path": str(tiny_wan_dir)}, "lgm": {"path": str(tmp_path / "lgm")},
        "data": {"prompts": str(tmp_path / "prompts.txt"), "num_frames": 9, "height": 64, "width": 64},
        "rewards": {"camera_motion_smoothness": 1.0, "geometry_reprojection_consistency": 1.0},
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "own.yaml"


def test_the_main_table_of_another_pipeline(recipe, tmp_path, capsys):
    output = tmp_path / "out"
    call = ["reproduce", "main", "--quick", "--config", str(recipe), "--sets", "static", "--arms", *ARMS, "--output",
            str(output), "--device", "cpu"]  # fmt: skip
    assert main(call) == 0
    result = json.loads((output / "main.json").read_text())
    rows = result["sets"]["static"]
    assert list(rows) == ARMS and list(result["against"]) == [arm for arm in ARMS if arm != "vggrpo"]
    assert all(row["checks"]["quality"]["about"] == "not measured" for row in rows.values())
    measured = [row["metrics"].keys() for row in rows.values()]
    assert all("motion_reward" in names and "judge_reprojection" not in names for names in measured)
    assert all(result["arms"][arm]["training_updates"] >= 1 for arm in ARMS)
    assert "weights of the pipeline" in (output / "main.md").read_text()
    assert "judge" in capsys.readouterr().out  # what is not measured is said


def test_an_lgm_of_another_pipeline_is_refused(recipe, tmp_path, capsys):
    call = ["reproduce", "main", "--quick", "--config", str(recipe), "--sets", "static", "--arms", "vggrpo", "--output",
            str(tmp_path / "out"), "--device", "cpu", "--set", "lgm.path=embedded"]  # fmt: skip
    assert main(call) != 0
    assert "was made for" in capsys.readouterr().err
