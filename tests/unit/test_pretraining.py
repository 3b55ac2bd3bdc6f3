"""Recipes of the shipped models: shards, the truth that supervises matching, exact resume of the training loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vggrpo import assets
from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction, project
from vggrpo.lgm.losses import unit_depth
from vggrpo.models.lucas_kanade import displacement
from vggrpo.models.vggt_layers import Displacement
from vggrpo.models.wan import WanVideoModel
from vggrpo.pretraining import data as shard_data
from vggrpo.pretraining import redraw
from vggrpo.pretraining.compress import compress_lora, widen_lora
from vggrpo.pretraining.data import Shards, augment, render_shard
from vggrpo.pretraining.geometry import reward_loss
from vggrpo.pretraining.loop import Schedule, fit, go_on_from, half_precision
from vggrpo.pretraining.matching import image_motion
from vggrpo.pretraining.redraw import redraw_shard
from vggrpo.pretraining.vae import CHANNELS, FRAMES, PATCH, Reader
from vggrpo.world import sample_batch


@pytest.fixture(scope="module")
def world():
    return sample_batch([11, 12, 13, 14]).views()


def test_image_motion_is_the_projection_of_points_that_move_with_the_scene(world):
    motion, valid = image_motion(world, 1)
    assert valid[:, :-1].float().mean() > 0.8 and not valid[:, -1].any()
    points = world.points + world.scene_flow
    for i in range(4):
        there, _ = project(
            points[:, i].flatten(1, 2), world.intrinsics[:, i + 1 : i + 2], world.cam2world[:, i + 1 :][:, :1]
        )
        here, _ = project(
            world.points[:, i].flatten(1, 2), world.intrinsics[:, i : i + 1], world.cam2world[:, i : i + 1]
        )
        want = (there - here)[:, 0].view(*motion[:, i].shape)
        torch.testing.assert_close(motion[:, i][valid[:, i]], want[valid[:, i]], atol=2e-3, rtol=1e-3)
    assert motion[:, :-1].abs().amax() > 2  # something moved


def test_backward_motion_of_a_clip_is_the_forward_motion_of_its_reverse(world):
    reverse = replace(
        world,
        depth=world.depth.flip(1),
        cam2world=world.cam2world.flip(1),
        object_id=world.object_id.flip(1),
        object_pose=world.object_pose.flip(2),
    )
    backward, ok = image_motion(world, -1)
    forward, also = image_motion(reverse, 1)
    torch.testing.assert_close(backward, forward.flip(1), atol=2e-3, rtol=1e-3)
    assert torch.equal(ok, also.flip(1))


def test_a_shard_holds_what_was_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_data, "SHARD_SIZE", 2)
    path = render_shard(tmp_path, 3, split=None)
    made, truth = Shards.load([path]), sample_batch([6, 7])
    assert [t["caption"] for t in made.texts] == truth.captions
    part = made.world(torch.tensor([1]), first=2, every=3)
    frames = [2, 5, 8, 11, 14]
    assert part.frame_index.tolist() == frames
    torch.testing.assert_close(part.depth[0], truth.depth[1, frames], rtol=1e-3, atol=0)
    anchored = torch.linalg.inv(truth.cam2world[1, 2]) @ truth.cam2world[1, frames]
    torch.testing.assert_close(part.cam2world[0], anchored, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.video[0], truth.video[1, :, frames], atol=1 / 255, rtol=0)
    time = path.stat().st_mtime_ns
    assert render_shard(tmp_path, 3).stat().st_mtime_ns == time  # made once


def test_redrawn_clips_show_what_was_rendered(tmp_path, monkeypatch):
    """The truth of the shard, and a picture that is not its own and nearer to it than to another clip's."""
    monkeypatch.setattr(shard_data, "SHARD_SIZE", 4)
    monkeypatch.setattr(redraw, "HIGHEST", 0.3)
    path = render_shard(tmp_path / "train", 2)
    made = redraw_shard(path, tmp_path / "redrawn", WanVideoModel.from_pretrained(assets.path("pipeline")))
    first, second = Shards.load([path]), Shards.load([made])
    assert made.name == path.name and first.texts == second.texts
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors if name != "video")
    a, b = (shards.video(torch.arange(4)) for shards in (first, second))
    own, others = ((a - x).square().flatten(1).mean(1) for x in (b, b.roll(1, 0)))
    assert (own > 1e-4).all() and (own < others / 3).all()
    time = made.stat().st_mtime_ns
    assert redraw_shard(path, tmp_path / "redrawn", None).stat().st_mtime_ns == time  # made once


@pytest.mark.parametrize("seed", range(6))
def test_augmented_worlds_are_worlds(world, seed):
    """Points of still pixels, seen from the next view, land on its depth map: mirrored and reversed clips too."""
    other = augment(world, torch.Generator().manual_seed(seed))
    motion, valid = image_motion(other, 1)
    v, u = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    there = (torch.stack([u, v], -1) + motion[:, 0]) / 32 - 1
    seen = torch.nn.functional.grid_sample(other.video[:, :, 1], there, align_corners=False)
    miss = (seen - other.video[:, :, 0]).abs().mean(1)
    still = (other.video[:, :, 1] - other.video[:, :, 0]).abs().mean(1)
    inside = valid[:, 0] & (there.abs().amax(-1) < 0.95)
    assert miss[inside].median() < 0.7 * still[inside].median()


def test_training_goes_on_bit_for_bit(tmp_path):
    def loss(model, step, generator):
        x = torch.randn(4, 3, generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

    def run(folder, steps):
        torch.manual_seed(0)
        return fit(nn.Linear(3, 1), loss, Schedule(steps=steps, lr=0.1, warmup=2, save_every=3), folder)

    class Stopped(Exception):
        pass

    def stopping(model, step, generator):
        if step == 7:
            raise Stopped
        return loss(model, step, generator)

    whole = run(tmp_path / "whole", 10)
    torch.manual_seed(0)
    with pytest.raises(Stopped):
        fit(nn.Linear(3, 1), stopping, Schedule(steps=10, lr=0.1, warmup=2, save_every=3), tmp_path / "cut")
    torch.manual_seed(1)  # another random state and another start: the checkpoint decides
    resumed = run(tmp_path / "cut", 10)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_displacement_is_measured_to_a_fraction_of_a_pixel():
    """A picture moved by a known vector; and rendered pairs against the truth of the renderer."""
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 12), size=(80, 80), mode="bicubic")
    crop = {
        shift: picture[:, :, 8 - shift[1] : 72 - shift[1], 8 - shift[0] : 72 - shift[0]] for shift in [(0, 0), (5, -3)]
    }
    flow, miss = displacement(crop[0, 0], crop[5, -3])
    inner = slice(12, 52)
    wanted = torch.tensor([5.0, -3.0]).view(1, 2, 1, 1)
    wrong = (flow - wanted)[:, :, inner, inner].norm(dim=1)
    assert wrong.quantile(0.9) < 0.3 and miss[:, inner, inner].median() < 0.02
    world = sample_batch(range(6)).views(4)
    motion, valid = (x[:, :-1].flatten(0, 1) for x in image_motion(world, 1))
    video = world.video.transpose(1, 2)
    flow, _ = displacement(video[:, :-1].flatten(0, 1), video[:, 1:].flatten(0, 1))
    v, u = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    lands = motion + torch.stack([u, v], -1)
    valid &= ((lands > 0) & (lands < 63)).all(-1)
    error = (flow.permute(0, 2, 3, 1) - motion).norm(dim=-1)[valid]
    assert error.median() < 0.5 and motion[valid].norm(dim=-1).median() > 2


def test_displacement_has_the_gradient_of_what_moved():
    soft = F.interpolate(torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)), (64, 64), mode="bicubic")
    moved = torch.tensor([1.3, -0.6], requires_grad=True)
    grid = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="xy"), -1) + 0.5 - moved
    second = F.grid_sample(soft, (grid / 32 - 1)[None], mode="bicubic", align_corners=False)
    flow, _ = displacement(soft, second)
    x, y = flow[0, :, 16:48, 16:48].mean((1, 2))
    torch.testing.assert_close(torch.stack([x, y]), moved, rtol=0, atol=0.1)
    for value, wanted in ((x, [1.0, 0.0]), (y, [0.0, 1.0])):
        (slope,) = torch.autograd.grad(value, moved, retain_graph=True)
        torch.testing.assert_close(slope, torch.tensor(wanted), rtol=0, atol=0.25)


def test_the_stem_says_which_neighbours_there_are():
    frames = torch.rand(2, 3, 3, 16, 24)
    measured = Displacement(8).measure(frames).unflatten(1, (5, 2))[:, 1::2]  # (mismatch, presence) ahead and back
    assert measured[:, 0, 1].amax((0, 2, 3)).tolist() == [1, 1, 0] and measured[:, 1, 1].shape[-2:] == (4, 6)


@pytest.mark.parametrize("shape", [(7,), (7, 3, 3), (7, 3, 3, 3)], ids=["linear", "conv2d", "conv3d"])
def test_compressed_lora_keeps_the_product(shape):
    """A product of rank 3 survives exactly at rank 3 and in a larger one; at rank 2 the smallest part is lost."""
    torch.manual_seed(0)
    a, b = torch.randn(5, *shape), torch.randn(6, 3) @ torch.randn(3, 5)
    state = {"x.lora_A.weight": a, "x.lora_B.weight": b.view(6, 5, *[1] * (len(shape) - 1)), "special": torch.ones(2)}
    want = b @ a.flatten(1)
    for rank in (2, 3, 8):
        out = compress_lora(state, rank)
        assert out["x.lora_A.weight"].shape == (rank, *shape) and torch.equal(out["special"], state["special"])
        assert out["x.lora_B.weight"].shape == (6, rank, *[1] * (len(shape) - 1))
        got = out["x.lora_B.weight"].flatten(1) @ out["x.lora_A.weight"].flatten(1)
        if rank >= 3:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        else:
            singular = torch.linalg.svdvals(want)
            torch.testing.assert_close((got - want).norm(), singular[rank:].norm(), rtol=1e-4, atol=1e-4)


def test_a_widened_lora_is_the_same_function_and_can_grow():
    low = {"x.lora_A.weight": torch.randn(2, 7), "x.lora_B.weight": torch.randn(6, 2), "special": torch.ones(2)}
    fresh = {"x.lora_A.weight": torch.randn(5, 7), "x.lora_B.weight": torch.zeros(6, 5), "special": torch.zeros(2)}
    wide = widen_lora(low, fresh)
    torch.testing.assert_close(
        wide["x.lora_B.weight"] @ wide["x.lora_A.weight"], low["x.lora_B.weight"] @ low["x.lora_A.weight"]
    )
    assert torch.equal(wide["x.lora_A.weight"][2:], fresh["x.lora_A.weight"][2:])  # B's zeros can leave zero
    assert torch.equal(wide["special"], low["special"]) and not fresh["x.lora_B.weight"].any()


def test_what_the_rewards_will_ask_reaches_the_network() -> None:
    world = sample_batch([0, 1], num_frames=9, shake="smooth")
    truth = unit_depth(world.geometry(every=4))
    exact, logs = reward_loss(truth, truth, consistency=True)
    assert exact == 0 and set(logs) == {"miss_shake", "miss_e_geo"}
    cameras = truth.cam2world.clone()
    cameras[:, 1, 0, 3] += 0.05  # the middle camera jumps aside
    cameras.requires_grad_(True)
    bent = GeometryPrediction.from_depth(cameras, truth.intrinsics, truth.depth, conf=truth.conf)
    bent.dynamic_mask, bent.frame_index = truth.dynamic_mask, truth.frame_index
    for consistency, name in ((False, "miss_shake"), (True, "miss_e_geo")):
        value, logs = reward_loss(bent, truth, consistency=consistency)
        (gradient,) = torch.autograd.grad(value, cameras)
        assert logs[name] > 0 and gradient.isfinite().all()
        assert (gradient[:, 1, 0, 3] > 0).all()  # back to where it was


def test_the_reader_draws_what_has_few_components_frame_by_frame():
    """Clips of as many independent patterns as there are channels: their coordinates draw them again, in their place.

    Every block has its own, so a frame, row or colour that changed places would show.
    """
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(CHANNELS, FRAMES, 3, PATCH, PATCH, generator=generator)
    weights = torch.randn(6, 2, 3, 2, CHANNELS, generator=generator)  # clips, groups of frames, rows and columns
    blocks = torch.einsum("ntvuc,cfkyx->nktfvyux", weights, patterns) / CHANNELS
    clips = blocks.flatten(2, 3).flatten(5, 6).flatten(3, 4)  # (6, 3, 8, 24, 16)
    video = torch.cat([torch.zeros(6, 3, 1, 24, 16), clips], 2)
    reader = Reader(video)
    coordinates = torch.linalg.lstsq(reader.basis, torch.eye(len(reader.basis))).solution  # (C, FRAMES 3 P P)
    rows = torch.einsum("nktfvyux->ntvufkyx", blocks).flatten(4) - reader.mean
    latents = (rows @ coordinates.T).permute(0, 4, 1, 2, 3)
    drawn = reader(torch.cat([torch.zeros_like(latents[:, :, :1]), latents], 2))
    assert drawn.shape == video.shape
    torch.testing.assert_close(drawn[:, :, 1:], clips, rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.square().mean((0, 2, 3, 4)), torch.ones(CHANNELS), rtol=0.05, atol=0)


def test_a_start_of_another_architecture_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"the VAE to start from is of another architecture.*size mismatch") as refusal:
        go_on_from(nn.Linear(2, 3), nn.Linear(2, 4), "VAE")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("has", "wanted"), [(True, True), (False, True), (True, False)])
def test_bfloat16_only_where_the_processor_has_it(monkeypatch, has, wanted):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    layer = torch.nn.Linear(2, 2)
    with half_precision(torch.device("cpu"), wanted):
        assert (layer(torch.ones(1, 2)).dtype == torch.bfloat16) == (has and wanted)
