"""The recipes on a device that is not the CPU: two steps of each on a pretended GPU give the CPU's numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from pretend_device import DeviceTensor, pretended_device

from vggrpo import assets
from vggrpo.models.vggt import VGGT, VGGTConfig
from vggrpo.models.wan import WanVideoModel
from vggrpo.pretraining import attributes, generator, geometry, lgm, loop, vae
from vggrpo.pretraining import data as shard_data
from vggrpo.pretraining.data import CPU, Shards, augment, render_shard
from vggrpo.pretraining.loop import Schedule, step_generator
from vggrpo.pretraining.matching import image_motion
from vggrpo.world.perturb import wobble

pytestmark = pytest.mark.e2e

CLIPS = 4
CHANNELS = json.loads((assets.path("pipeline") / "transformer" / "config.json").read_text())["in_channels"]
SMALL = VGGTConfig(
    dim=32, heads=4, conv_layers=2, pairs=2, registers=1, stem_blocks=1, stem_displacement=True, hooks=(1, 2),
    head_features=16, head_detail=True, mlp_ratio=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_data, "SHARD_SIZE", CLIPS)
        return render_shard(tmp_path_factory.mktemp("data"), 0, split=None)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Few clips a step, everything that is drawn by chance done at every step, nothing saved."""
    monkeypatch.setattr(loop, "_save", lambda *_: None)
    monkeypatch.setattr(vae, "STAGES", ((1.0, 5, 1),))
    for module in (attributes, generator, geometry, lgm):
        monkeypatch.setattr(module, "BATCH", 2)
    for name in ("BLUR_SHARE", "FEW_SHARE"):
        monkeypatch.setattr(geometry, name, 1.0)
    monkeypatch.setattr(geometry, "CONSISTENCY_FROM", 0.0)
    for name, value in (("CONSISTENCY_FROM", 0.0), ("NOISE_SHARE", 1.0)):
        monkeypatch.setattr(lgm, name, value)


def both_places(monkeypatch, folder, run, *, fits=True):
    """`run(device, folder)` on the CPU and on the pretended device: what the two logged, row by row, and returned."""
    monkeypatch.setattr(shard_data, "_fit", lambda columns, device: fits and device != CPU)
    out = [run(CPU, folder / "cpu")]
    with pretended_device() as device:
        out.append(run(device, folder / "device"))
    rows = [json.loads((folder / name / "log.jsonl").read_text()) for name in ("cpu", "device")]
    for row in rows:
        row.pop("seconds")
    return rows, out


def close(measured, truth):
    assert measured.keys() == truth.keys()
    assert measured == pytest.approx(truth, rel=2e-3, abs=1e-5, nan_ok=True)  # a flow of clips where nothing moves


TWO = Schedule(steps=2, lr=1e-4, warmup=1)


@pytest.mark.parametrize(("wobbling", "fits"), [(0.0, True), (1.0, False)], ids=["clips there", "wobbling, clips here"])
def test_geometry(shard, tmp_path, monkeypatch, wobbling, fits):
    monkeypatch.setattr(geometry, "WOBBLE_SHARE", wobbling)

    def run(device, folder):
        data = Shards.load([shard], device=device)
        assert isinstance(data.tensors["video"], DeviceTensor) == (fits and device != CPU)
        model = geometry.train_geometry(data, folder, SMALL, TWO, bf16=False)
        return geometry.measure_geometry(model, data)

    (cpu, device), measured = both_places(monkeypatch, tmp_path, run, fits=fits)
    close(device, cpu)
    close(measured[1], measured[0])


def test_attributes(shard, tmp_path, monkeypatch):
    def run(device, folder):
        data = Shards.load([shard], truth=False, device=device)
        model = attributes.train_attributes(data, folder, TWO, bf16=False)
        return attributes.measure_attributes(model, data)

    (cpu, device), measured = both_places(monkeypatch, tmp_path, run)
    close(device, cpu)
    close(measured[1], measured[0])


def test_vae_and_generator(shard, tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "latent_statistics", lambda *_: ([0.1] * vae.CHANNELS, [0.9] * vae.CHANNELS))

    def run(device, folder):
        data = Shards.load([shard], truth=False, device=device)
        made = vae.train_vae(data, folder, TWO, TWO, bf16=False)
        latents = generator.encode_latents(made, shard, folder / "latents")
        generator.train_generator([latents], data.texts, folder, TWO, bf16=False, device=device)
        parts = ("encoder", "decoder", ".")
        rows = {part: json.loads((folder / part / "log.jsonl").read_text()) for part in parts}
        return {part: {name: v for name, v in row.items() if name != "seconds"} for part, row in rows.items()}

    _, (here, there) = both_places(monkeypatch, tmp_path, run)
    for part, row in here.items():
        close(there[part], row)


def test_lgm(shard, tmp_path, monkeypatch):
    """One step on rendered clips, then one on generated ones, between stitch and measurement."""
    monkeypatch.setattr(lgm, "GENERATED_SHARE", 0.5)
    schedule = replace(TWO, seed=2)
    kinds = [torch.rand((), generator=step_generator(schedule.seed, step)) < 0.5 for step in range(2)]
    assert [bool(kind) for kind in kinds] == [False, True]
    torch.manual_seed(0)
    weights, made = VGGT(SMALL).state_dict(), (torch.randn(2, CHANNELS, 5, 8, 8), torch.rand(2, 5, 3, 64, 64))
    # Read before the device is there: diffusers makes networks on the very device that torch sees in its place.
    pipelines = [WanVideoModel.from_pretrained(assets.path("pipeline"), load_text=False) for _ in range(2)]

    def run(device, folder):
        teacher = VGGT(SMALL)
        teacher.load_state_dict(weights)
        teacher.requires_grad_(False).to(device)
        video_model = pipelines.pop()
        for part in (video_model.transformer, video_model.vae):
            part.to(device)
        clips = lgm.EncodedClips(Shards.load([shard], device=device), video_model)
        first = lgm.stitch(teacher, clips)[0]
        config = lgm.config_for(first.layer, video_model, teacher)
        generated = tuple(part.to(device) for part in made)
        model = lgm.train_lgm(teacher, clips, first, config, folder, schedule, generated, bf16=False)
        return lgm.measure_lgm(lgm.compressed(model, teacher), teacher, clips, count=2)["lgm"]

    (cpu, device), measured = both_places(monkeypatch, tmp_path, run)
    close(device, cpu)
    close(measured[1], measured[0])


@pytest.mark.parametrize("seed", range(4))
def test_augmented_worlds_and_their_motion(shard, seed):
    def run(device):
        world = Shards.load([shard], device=device).world(torch.arange(2), every=4)
        world = augment(wobble(world, torch.ones(2), seed), torch.Generator().manual_seed(seed))
        return [*image_motion(world, 1), world.scene_flow, world.points]

    here = run(CPU)
    with pytest.MonkeyPatch.context() as patch, pretended_device() as device:
        patch.setattr(shard_data, "_fit", lambda columns, device: False)
        there = [value.cpu() for value in run(device)]
    assert all(map(torch.equal, here, there))


def test_a_shard_is_the_same_wherever_it_is_rendered(shard, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_data, "SHARD_SIZE", CLIPS)
    with pretended_device() as device:
        other = render_shard(tmp_path, 0, split=None, device=device)
    assert other.read_bytes() == shard.read_bytes()
