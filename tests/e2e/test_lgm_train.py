"""`vggrpo train-lgm` as a whole: real videos through a real autoencoder, two processes, and a compiled LGM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

UNIT = Path(__file__).parents[1] / "unit"
sys.path.insert(0, str(UNIT))

REAL = [
    "video.kind=image", "clips.generated_share=0", "clips.num_frames=5", "clips.frame_stride=4", "clips.height=64",
    "clips.width=112", "clips.clips_per_video=3", "clips.shard_size=4", "stitch.layers=[0, 1]", "updates=2",
    "save_every=2", "distill.batch=2", "distill.lora_rank=4", "distill.lora_alpha=4",
]  # fmt: skip


def call(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "vggrpo.cli", *arguments], check=True, timeout=600)


@pytest.mark.e2e
def test_real_videos_through_a_real_autoencoder(tmp_path, shared_dir):
    """Cache, search, train, analyse. The numbers say nothing: a few clips, a teacher of another world."""
    data = shared_dir / "data"
    out, vae, videos = str(tmp_path / "run"), str(data / "autoencoder"), str(data / "videos")
    call("train-lgm", "lgm-tiny", f"output={out}", f"video.path={vae}", f"clips.videos={videos}", *REAL)
    search = json.loads((tmp_path / "run" / "search.json").read_text())
    assert [row["r2"] is not None for row in search["layers"]] == [True, True]
    lgm = str(tmp_path / "run" / "lgm")
    config = json.loads((tmp_path / "run" / "lgm" / "config.json").read_text())
    assert (config["latent_channels"], config["temporal_stride"], config["stride"]) == (32, 1, 1)
    options = ["--videos", str(data / "videos" / "nasa_13013.mp4"), "--clips", "2", "--frames", "5", "--size", "64x112"]
    call("analyze-lgm", "--lgm", lgm, "--video-model", vae, *options, "--output", str(tmp_path / "analysis"))
    result = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert result["accuracy"]["clips"] == 2 and result["noise"]["lgm"]["abs_rel"][0] > 0


@pytest.mark.e2e
def test_two_processes_equal_one(tmp_path):
    """The same batches, shared: the same losses to rounding, and one set of weights."""
    from lgm_material import teacher, write_videos

    write_videos(tmp_path / "videos", 6)
    teacher().save_pretrained(tmp_path / "vggt")
    code = (
        f"import sys; sys.path[:0] = [{str(UNIT)!r}, {str(Path(__file__).parent)!r}]\n"
        "import test_lgm_training as t\nfrom pathlib import Path\n"
        f"root = Path({str(tmp_path)!r})\n"
        "t.train(root, sys.argv[1], f'cache={root / (sys.argv[1] + \"-cache\")}', 'stitch.layers=[0]')\n"
    )
    subprocess.run([sys.executable, "-c", code, "one"], check=True, timeout=300)
    job = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    both = [
        subprocess.Popen([sys.executable, "-c", code, "two"], env=job | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1]) == 6
    for one, two in zip(*logs, strict=True):
        for key in ("depth", "translation", "rotation"):
            assert two[key] == pytest.approx(one[key], rel=1e-2, abs=1e-5), key


@pytest.mark.e2e
def test_a_compiled_lgm_says_the_same_and_is_differentiable():
    from test_lgm_analysis import lgm

    model = lgm()
    compiled = torch.compile(model, backend="aot_eager")
    latents = torch.randn(1, 3, 3, 4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (want,) = torch.autograd.grad(model(latents).depth.log().sum(), latents)
    (got,) = torch.autograd.grad(compiled(latents).depth.log().sum(), latents)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.e2e
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_compiled_plug_says_the_same(differentiable):
    from test_lgm_analysis import lgm
    from torch._dynamo.utils import counters

    from vggrpo import LatentGeometryReward

    torch.compiler.reset()  # of one function so many versions are compiled, and others may have used them up
    counters.clear()
    reward = LatentGeometryReward(lgm(layer=1), differentiable=differentiable)
    compiled = torch.compile(reward, backend="aot_eager")
    latents = torch.randn(2, 3, 3, 4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_(differentiable)
    want, got = reward(latents), compiled(latents)
    assert counters["stats"]["unique_graphs"] > 0  # something was compiled
    assert want["valid"].all() and got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
        assert got[name].requires_grad == want[name].requires_grad
    if differentiable:
        gradients = [torch.autograd.grad((s["motion"] + s["geometry"]).sum(), latents)[0] for s in (got, want)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
        assert gradients[0].abs().max() > 1e-3


@pytest.mark.e2e
def test_the_documented_cost_at_full_shape():
    """Counted without weights at 480x832x81: the numbers of docs/train_lgm.md."""
    from vggrpo.evaluation.lgm_cost import WAN_2_1, cost_table, full_shape, reward_paths
    from vggrpo.models.any4d import Any4D, Any4DConfig

    paths = reward_paths(*full_shape(WAN_2_1, lambda: Any4D(Any4DConfig())))
    table = cost_table({name: paths[name] for name in ("rgb", "lgm_latent")}, torch.device("meta"))
    documented = (UNIT.parents[1] / "docs" / "train_lgm.md").read_text()
    row = next(line for line in documented.splitlines() if line.startswith("| Wan2.1-1.3B, 480x832x81"))
    numbers = [float(cell) for cell in row.split("|")[2:-1]]
    assert table["rgb"]["flops"] / 1e12 == pytest.approx(numbers[0], rel=2e-3)
    assert table["lgm_latent"]["flops"] / 1e12 == pytest.approx(numbers[2], rel=2e-3)
    assert 1 / table["lgm_latent"]["flops_of_rgb"] == pytest.approx(4.0, abs=0.005)  # as the text says
