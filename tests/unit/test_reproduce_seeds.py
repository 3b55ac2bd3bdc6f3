"""Training seeds in the tables: shown one by one, counted apart from video seeds, and each of them must agree."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vggrpo.evaluation import KernelComparison, summarise_comparison, verdict
from vggrpo.evaluation.statistics import Interval, NonInferiority
from vggrpo.reproduce import TABLES, Settings, cells, run
from vggrpo.reproduce.cells import BASE, arm_named, compared, paired, run_by_run, worst_kernel
from vggrpo.reproduce.plan import Costs
from vggrpo.reproduce.plan import cells as planned

HIGHER = {"epipolar_inliers": True, "judge_reprojection": False}


def rows(gain: float, prompts: int = 96, videos: int = 2) -> list[dict]:
    """Rows of an arm that is better than gain 0 by `gain` in both headline metrics, and the same in all else."""
    out = []
    for i in range(prompts):
        for seed in range(videos):
            values = {name: 0.5 + 1e-3 * (i % 7) + (gain if up else -gain) for name, up in HIGHER.items()}
            values |= {"motion_flow": 0.1, "adherence": 0.6}
            metrics = {name: {"value": v, "unit": "", "valid": True, "reason": None} for name, v in values.items()}
            out.append({"path": f"{i}-{seed}.mp4", "prompt": f"prompt {i}", "seed": seed, "arm": "x"}
                       | {"metrics": metrics})  # fmt: skip
    return out


def kernel(difference: float, reach: float, margin: float = 0.1) -> KernelComparison:
    interval = Interval(difference, difference - 0.01, reach, 0.5, 96)
    return KernelComparison(0.2, 0.2 + difference, interval, NonInferiority(reach < margin, reach, margin))


def judged(gains: list[float], **size: int):
    before, after = [rows(0.0, **size)], [rows(gain, **size) for gain in gains]
    return verdict(paired(before, after), kernel(0.0, 0.05), run_by_run(before, after))


def test_every_training_seed_must_improve():
    assert judged([0.02, 0.03, 0.01]).counts
    found = judged([0.05, 0.05, -0.01])
    outcome, text = found.checks["epipolar_inliers"]
    assert outcome is False and "by training seed +0.05, +0.05, -0.01" in text
    assert found.checks["judge_reprojection"][0] is False and not found.counts
    before, after = [rows(0.0)], [rows(gain) for gain in (0.05, 0.05, -0.01)]
    assert verdict(paired(before, after), kernel(0.0, 0.05)).counts  # pooled, two good runs hide the third


def test_video_seeds_and_training_seeds_are_counted_apart():
    outcome, text = judged([0.02, 0.02, 0.02]).checks["sample"]
    assert outcome and text.startswith("96 prompts x 2 video seeds")
    outcome, text = judged([0.02, 0.02, 0.02], videos=1).checks["sample"]
    assert not outcome and text.startswith("96 prompts x 1 video seeds; a claim needs 96 x 2")


def test_a_summary_has_every_training_seed():
    before, after = [rows(0.0, 8)], [rows(0.02, 8), rows(-0.01, 8)]
    found = summarise_comparison(paired(before, after), runs=run_by_run(before, after))
    assert found["epipolar_inliers"]["by_training_seed"] == pytest.approx([0.02, -0.01])
    assert found["judge_reprojection"]["by_training_seed"] == pytest.approx([-0.02, 0.01])
    assert "by_training_seed" not in found["adherence"]
    assert found["epipolar_inliers"]["motion_matched"]["diff"] == pytest.approx(0.005)
    assert found["epipolar_inliers"]["motion_matched"]["n"] == 8


def test_the_worst_is_by_how_far_it_reaches_over_its_margin():
    kernels = [kernel(0.0, 0.02), kernel(0.05, 0.3), kernel(0.2, 0.29)]
    assert worst_kernel(kernels) is kernels[1]


@pytest.fixture
def quality(monkeypatch):
    """Kernel distances without videos: of the first training seeds good, of the third one bad."""
    asked = []

    def fake(base, tuned, *, reference):
        asked.append((base.parent.name, tuned.parent.name))
        return kernel(0.2, 0.3) if tuned.parent.name.endswith("s2") else kernel(0.01, 0.05)

    monkeypatch.setattr(cells, "compare_quality", fake)
    monkeypatch.setattr(cells, "reference_clips", lambda settings: np.ones((2, 3), np.float32))
    monkeypatch.setattr(cells, "same_latents", lambda first, second: False)
    return asked


def test_quality_is_that_of_the_worst_training_seed(tmp_path, quality):
    runs = {"base": [rows(0.0)], "sft": [rows(0.02), rows(0.03), rows(0.01)]}
    row = compared(arm_named("sft"), BASE, runs, ["world-static"], tmp_path, Settings())
    assert quality == [("base-s0", f"sft-s{seed}") for seed in range(3)]
    assert row["metrics"]["kernel_distance"]["by_training_seed"] == [0.01, 0.01, 0.2]
    assert row["metrics"]["kernel_distance"]["diff"] == 0.2 and not row["counts"]
    assert not row["checks"]["quality"]["outcome"]
    assert row["checks"]["quality"]["about"].endswith("the worst of 3 training seeds")
    assert all(check["outcome"] for name, check in row["checks"].items() if name != "quality")


def test_rendered_clips_are_made_once(monkeypatch):
    made = []

    def fake(count, models, **shape):
        made.append((count, shape))
        return np.ones((count, 3), np.float32)

    monkeypatch.setattr(cells, "reference_features", fake)
    cells._rendered.cache_clear()
    assert all(len(cells.reference_clips(Settings())) == 96 for _ in range(3))
    assert made == [(96, {"num_frames": 17, "size": (64, 64)})]
    cells._rendered.cache_clear()


def test_an_arm_with_anothers_lora_is_paired_with_its_owner(tmp_path, monkeypatch, quality):
    gains = {"base": 0.0, "vggrpo": 0.03, "vggrpo-guided-100": 0.02}

    def fake_measured(arm, seed, prompt_set, *_):
        return [row | {"prompt": f"{prompt_set}: {row['prompt']}"} for row in rows(gains[arm.name] + 1e-4 * seed, 8)]

    monkeypatch.setattr(run, "measured", fake_measured)
    table = TABLES["guidance"]
    arm = arm_named("vggrpo-guided-100")
    path = run._table("guidance", table, tmp_path, Settings(sets=("world-static",)), [arm], lambda _: None)
    result = json.loads((tmp_path / "guidance.json").read_text())
    owned = result["owners"]["vggrpo-guided-100"]
    assert owned["owner"] == "vggrpo" and owned["metrics"]["epipolar_inliers"]["diff"] == pytest.approx(-0.01)
    assert result["sets"]["world-static"]["vggrpo-guided-100"]["metrics"]["epipolar_inliers"]["diff"] > 0
    assert ("vggrpo-s1", "vggrpo-guided-100-s1") in quality and ("base-s0", "vggrpo-guided-100-s1") in quality
    section = path.read_text().split("## Against the arm whose LoRA it samples with")[1].split("## Arms")[0]
    assert "| vggrpo-guided-100 - vggrpo | -0.01 [-0.01, -0.01] ▼ |" in section
    assert "| vggrpo-guided-100 - vggrpo | epipolar_inliers | -0.01, -0.01, -0.01 | 0% | 0 / 0 |" in section


def test_the_plan_has_the_videos_of_the_owner(tmp_path):
    costs = Costs(video=1.0, gradient=0.5, start=10.0, sampled=2.0)
    settings = Settings(seeds=2, prompts=4, videos=1, sets=("world-static",))
    names = {cell.name for cell in planned(["guidance"], tmp_path, settings, ["vggrpo-guided-100"], costs)}
    assert {f"world-static/{arm}-s{s}" for arm in ("vggrpo", "vggrpo-guided-100") for s in (0, 1)} < names
