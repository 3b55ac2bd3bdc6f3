"""Metrics that need a network or a package: truth, teacher, VBench; and what is said when it isn't there."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
import torch

from vggrpo import assets
from vggrpo.errors import UserError
from vggrpo.evaluation import METRICS, Clip, EvaluationModels, evaluate_clip
from vggrpo.evaluation.metrics import insisted, select
from vggrpo.geometry import GeometryPrediction, so3_exp
from vggrpo.world import sample_batch

vbench = importlib.import_module("vggrpo.evaluation.metrics.vbench")  # the package's own `vbench` is its function
TRUTH = ["truth_depth", "truth_rotation", "truth_translation", "truth_mask"]


class Oracle(torch.nn.Module):
    """Answers with the renderer's truth in another scale, every camera but the first turned by some degrees."""

    def __init__(self, geometry: GeometryPrediction, degrees: float = 0.0) -> None:
        super().__init__()
        self.geometry, self.degrees = geometry, degrees

    def forward(self, frames: torch.Tensor) -> GeometryPrediction:
        real = self.geometry
        poses = real.cam2world.clone()
        poses[..., :3, 3] /= 2
        poses[:, 1:, :3, :3] @= so3_exp(torch.tensor([0.0, np.deg2rad(self.degrees), 0.0]).float())
        return GeometryPrediction.from_depth(poses, real.intrinsics, real.depth / 2, dynamic_mask=real.dynamic_mask)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    batch = sample_batch([5], camera="truck_right", shake="smooth")
    file = tmp_path_factory.mktemp("truth") / "clip.npz"
    np.savez(file, **{name: getattr(batch, name)[0].numpy() for name in ("depth", "cam2world", "dynamic_mask")})
    frames = (batch.video[0].permute(1, 2, 3, 0) * 255).round().byte().numpy()
    return batch, Clip(frames, 8, truth=file)


def test_truth_judges_a_geometry_network_up_to_scale(world):
    batch, clip = world
    found = evaluate_clip(clip, TRUTH, EvaluationModels(judge=Oracle(batch.geometry(), degrees=3.0)))
    assert found["truth_depth"].value == pytest.approx(0, abs=1e-5)
    assert found["truth_rotation"].value == pytest.approx(3.0, abs=1e-2)
    assert found["truth_translation"].value == pytest.approx(0, abs=1e-5)
    moving = bool(batch.dynamic_mask.any())
    assert found["truth_mask"].value == (pytest.approx(1) if moving else None)


def test_generated_clips_have_no_truth(world):
    _, clip = world
    for measurement in evaluate_clip(Clip(clip.frames, 8), TRUTH).values():
        assert "only rendered clips" in str(measurement.reason)


def test_the_teacher_is_no_judge_and_its_number_is_labelled_reward(world):
    _, clip = world
    models = EvaluationModels(judge=assets.path("geometry"))
    with pytest.raises(UserError, match="LGM's teacher"):
        models.check(["judge"])
    assert "LGM's teacher" in str(evaluate_clip(clip, ["judge_reprojection"], models)["judge_reprojection"].reason)
    assert METRICS["teacher_reprojection"].independence == "reward"
    assert evaluate_clip(clip, ["teacher_reprojection"])["teacher_reprojection"].valid


def test_the_judge_takes_any_size_and_length():
    models = EvaluationModels()
    clip = Clip(np.random.default_rng(0).integers(0, 255, (90, 72, 101, 3), dtype=np.uint8), 24)
    frames, index = models.views("judge", clip)
    assert frames.shape == (1, len(index), 3, 64, 96) and len(index) <= 21 and index[:2] == [0, 8]
    assert models.judge_prediction(clip).frame_index.tolist() == index


def test_all_does_not_insist_on_what_only_all_asks_for():
    assert [metric.name for metric in insisted("all")] == [metric.name for metric in select("fast")]
    assert [metric.name for metric in insisted("sfm_registered")] == ["sfm_registered"]


@pytest.fixture
def stand_in_vbench(tmp_path, monkeypatch):
    """A package with VBench's interface, and the files that its cache would hold."""
    package = tmp_path / "packages" / "vbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import json, os, pathlib\n"
        "class VBench:\n"
        "    def __init__(self, device, full_info_dir, output_path):\n"
        "        self.output = pathlib.Path(output_path); self.output.mkdir()\n"
        "    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, mode=''):\n"
        "        assert os.path.isfile(videos_path) and local and mode == 'custom_input'\n"
        "        results = {d: [len(prompt_list[0]) / 100, []] for d in dimension_list}\n"
        "        (self.output / f'{name}_eval_results.json').write_text(json.dumps(results))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "cache"))
    vbench._has_vbench.cache_clear()
    yield tmp_path / "cache"
    vbench._has_vbench.cache_clear()


def test_vbench_is_called_with_its_own_interface(world, stand_in_vbench):
    _, clip = world
    for files in vbench.DIMENSIONS.values():
        for file in files:
            (stand_in_vbench / file).parent.mkdir(parents=True, exist_ok=True)
            (stand_in_vbench / file).touch()
    prompt = 'a "quoted" prompt; $(true)'
    names = [name for name in METRICS if name.startswith("vbench_")]
    found = evaluate_clip(Clip(clip.frames, 8, prompt), names)
    assert len(found) == 7 and all(m.value == pytest.approx(len(prompt) / 100) for m in found.values()), found


def test_vbench_names_what_is_missing(stand_in_vbench, monkeypatch):
    assert "lacks weights of VBench: dino_model" in str(vbench.vbench_missing())
    monkeypatch.setenv("PYTHONPATH", "")
    vbench._has_vbench.cache_clear()
    assert "pip install vbench" in str(vbench.vbench_missing()) and sys.executable in str(vbench.vbench_missing())
    monkeypatch.setenv(vbench.PYTHON, "/nowhere/python")
    with pytest.raises(UserError, match="cannot run"):
        vbench.vbench_missing()
    assert "cannot run" in EvaluationModels().missing(["vbench"])["vbench"]


def test_registry_is_complete():
    assert json.dumps(sorted(METRICS))  # names are plain keys of a row
    for metric in METRICS.values():
        assert metric.unit and metric.about.endswith(".") and metric.about.count(".") < 3
        assert metric.cost == "slow" or set(metric.needs) <= {"judge", "attributes"}
