"""`vggrpo audit-reward` on a user's own pipeline, prompts and judge."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from vggrpo import assets
from vggrpo.cli import main
from vggrpo.evaluation import audit

pytestmark = pytest.mark.e2e


def test_any_video_model_prompts_and_judge(tmp_path, capsys, monkeypatch):
    seen, drawn = [], audit.write_audit_page
    monkeypatch.setattr(audit, "write_audit_page", lambda *given: (seen.append(given[3]), drawn(*given)))
    shutil.copytree(assets.path("pipeline"), tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("The camera orbits left around a red ball.\nA blue box rolls.\n")
    own = ["--video-model", str(tmp_path / "pipeline"), "--judge", str(assets.path("geometry"))]
    sampled = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--guidance-scale", "3", "--batch", "4"]
    small = ["--clips", "8", "--frames", "9", "--device", "cpu", "--dtype", "bfloat16"]
    assert main(["audit-reward", "--output", str(tmp_path / "audit"), *own, *sampled, *small]) == 0
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert (found["clips"], found["steps"], found["guidance_scale"]) == (8, 2, 3.0)
    # This judge is the LGM's own teacher, which sees the decoded clips of the generator; the judge their mirrors, too.
    assert found["base_value_judge"] == pytest.approx(found["teacher"]["base_value"])
    (generated,) = seen
    for term, once in generated["judge_once"].items():
        torch.testing.assert_close(once, generated["teacher"][term], equal_nan=True)
        both = (once + generated["judge_mirrored"][term]) / 2
        torch.testing.assert_close(generated["judge"][term], both, equal_nan=True)
    assert not torch.equal(generated["judge_once"]["e_geo"], generated["judge_mirrored"]["e_geo"])
    assert (tmp_path / "audit" / "audit.html").stat().st_size > 1000
    assert main(["audit-reward", "--output", str(tmp_path / "x"), "--prompts", str(tmp_path / "none.txt"), *small]) == 2
    assert "none.txt" in capsys.readouterr().err
