"""`vggrpo audit-reward` on a user's own pipeline, prompts and judge."""

from __future__ import annotations

import json
import shutil

import pytest

from vggrpo import assets
from vggrpo.cli import main

pytestmark = pytest.mark.e2e


def test_any_video_model_prompts_and_judge(tmp_path, capsys):
    shutil.copytree(assets.path("pipeline"), tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("The camera orbits left around a red ball.\nA blue box rolls.\n")
    own = ["--video-model", str(tmp_path / "pipeline"), "--judge", str(assets.path("geometry"))]
    sampled = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--guidance-scale", "3", "--batch", "4"]
    small = ["--clips", "8", "--frames", "9", "--device", "cpu", "--dtype", "bfloat16"]
    assert main(["audit-reward", "--output", str(tmp_path / "audit"), *own, *sampled, *small]) == 0
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert (found["clips"], found["steps"], found["guidance_scale"]) == (8, 2, 3.0)
    # This judge is the LGM's own teacher, which sees the decoded clips of the generator; the judge their mirrors, too.
    assert found["teacher"]["spearman_judge"]["e_geo"] > 0
    assert found["base_value_judge"] == pytest.approx(found["teacher"]["base_value"], rel=0.3)
    assert found["base_value_judge"] != found["teacher"]["base_value"]
    assert (tmp_path / "audit" / "audit.html").stat().st_size > 1000
    assert main(["audit-reward", "--output", str(tmp_path / "x"), "--prompts", str(tmp_path / "none.txt"), *small]) == 2
    assert "none.txt" in capsys.readouterr().err
