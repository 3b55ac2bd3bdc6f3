"""The embedded world is what it claims: seeds, depth, flow, captions, shake, and known wobble."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from vggrpo.geometry import depth_edges, project, rotation_angle
from vggrpo.rewards import geometry_reprojection_consistency
from vggrpo.world import CAMERA_MOVES, WorldBatch, caption_to_attributes, sample_batch, sample_prompts
from vggrpo.world.captions import caption, sample_attributes, split_of
from vggrpo.world.perturb import wobble
from vggrpo.world.scene import FPS, sample_scene

NEAR_ENOUGH = 1e-3
# Bilinear interpolation errs by at most an eighth of the second difference an axis: a quarter of this in all.
CURVATURE = 2e-3


@cache
def world() -> WorldBatch:
    """Clips of which some move, some are hand-held."""
    return sample_batch(range(8), num_frames=5, size=(48, 56))


def read(world: WorldBatch, frame: int, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `frame` sees where world points (B, H, W, 3) project to: the points' z, the depth read linearly in inverse
    depth, the object there, and where that could be read (inside, one smooth surface)."""
    size = world.depth.shape[-2:]
    pose, intrinsics = world.cam2world[:, frame : frame + 1].double(), world.intrinsics[:, frame : frame + 1].double()
    uv, z = project(points.double().flatten(1, 2), intrinsics, pose)
    uv, z = uv[:, 0].view(*points.shape[:3], 2), z.view(points.shape[:3])
    inverse = 1 / world.depth[:, frame].double()
    low = (uv - 0.5).floor()
    inside = (low >= 1).all(-1) & (low[..., 0] < size[1] - 2) & (low[..., 1] < size[0] - 2) & (z > 0)
    column, row = (torch.where(inside, low[..., k], 1).long() for k in (0, 1))
    fraction = torch.where(inside[..., None], uv - 0.5 - low, 0)
    clip = torch.arange(len(z))[:, None, None]
    bent = depth_edges(world.depth[:, frame], threshold=CURVATURE)
    value, smooth = torch.zeros_like(z), inside.clone()
    identity = world.object_id[:, frame]
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (fraction[..., 0] if dx else 1 - fraction[..., 0]) * (
                fraction[..., 1] if dy else 1 - fraction[..., 1]
            )
            value = value + weight * inverse[clip, row + dy, column + dx]
            smooth &= ~bent[clip, row + dy, column + dx]
            smooth &= identity[clip, row + dy, column + dx] == identity[clip, row, column]
    return z, 1 / value, identity[clip, row, column], smooth


def check_lands(z: Tensor, depth: Tensor, source: Tensor, target: Tensor, readable: Tensor) -> Tensor:
    """No point lies in front of what the frame sees, and points behind it are hidden by an object. Returns which met
    the surface they left."""
    error = (z - depth) / depth
    assert (error[readable] > -NEAR_ENOUGH).all()
    hidden = error >= NEAR_ENOUGH
    assert (target[readable & hidden] > 0).all()  # the room is convex and seen from within: it hides nothing
    met = readable & ~hidden
    assert (source[met] == target[met]).float().mean() > 0.999  # an object may touch the floor within the tolerance
    return met


def test_a_seed_is_a_clip_in_any_batch() -> None:
    many = sample_batch([3, 5, 8], num_frames=3, size=(24, 32))
    for k, seed in enumerate((3, 5, 8)):
        one = sample_batch([seed], num_frames=3, size=(24, 32))
        assert one.captions == [many.captions[k]] and one.handheld == [many.handheld[k]]
        assert one.attributes == [many.attributes[k]]
        for name in ("video", "depth", "cam2world", "intrinsics", "object_pose"):
            torch.testing.assert_close(getattr(one, name)[0], getattr(many, name)[k], rtol=1e-5, atol=1e-5)
        assert torch.equal(one.object_id[0], many.object_id[k]) and torch.equal(one.moves[0], many.moves[k])
    again = sample_batch([3, 5, 8], num_frames=3, size=(24, 32))
    assert torch.equal(again.video, many.video) and torch.equal(again.depth, many.depth)
    assert not torch.equal(many.depth[0], many.depth[1])


def test_the_first_camera_is_the_world_and_colours_are_in_range() -> None:
    torch.testing.assert_close(world().cam2world[:, 0], torch.eye(4).expand(8, 4, 4), rtol=0, atol=1e-5)
    assert world().video.min() >= 0 and world().video.max() <= 1 and (world().depth > 0.2).all()


@pytest.mark.parametrize(("i", "j"), [(0, 4), (4, 0), (1, 2), (3, 1)])
def test_static_pixels_meet_the_depth_of_other_frames(i: int, j: int) -> None:
    w = world()
    z, depth, target, readable = read(w, j, w.points[:, i])
    static = ~w.dynamic_mask[:, i]
    met = check_lands(z, depth, w.object_id[:, i], target, readable & static)
    assert met.sum() > 0.9 * (readable & static).sum() and met.float().mean() > 0.3


def test_scene_flow_lands_on_the_same_object() -> None:
    w = world()
    flow, points, counted = w.scene_flow, w.points, 0
    assert (flow[:, -1] == 0).all() and (flow[~w.dynamic_mask].abs() < 1e-5).all()
    assert flow[w.dynamic_mask & (torch.arange(5) < 4)[:, None, None]].norm(dim=-1).median() > 0.01
    for t in range(4):
        z, depth, target, readable = read(w, t + 1, points[:, t] + flow[:, t])
        met = check_lands(z, depth, w.object_id[:, t], target, readable)
        moving = readable & w.dynamic_mask[:, t] & (target == w.object_id[:, t])
        assert (met & moving).sum() > 0.9 * moving.sum()  # the rest turned to the far side
        counted += int((met & moving).sum())
    assert counted > 200


def test_captions_say_their_attributes() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        attributes = sample_attributes(rng)
        said = caption_to_attributes(caption(attributes, rng))
        assert said is not None and sorted(said.pop("camera")) == sorted(attributes.pop("camera"))
        assert said == attributes
    assert caption_to_attributes("A cat sits on a mat.") is None


def test_prompt_splits_are_respected_and_disjoint() -> None:
    seen: dict[str, set[str]] = {}
    for split in ("train", "heldout", "demo"):
        prompts = sample_prompts(60, seed=1, split=split)
        assert prompts == sample_prompts(60, seed=1, split=split) and len(set(prompts)) == 60
        attributes = [caption_to_attributes(prompt) for prompt in prompts]
        assert all(a is not None and split_of(a) == split for a in attributes)
        assert 0.25 < np.mean([any(o["motion"] for o in a["objects"]) for a in attributes if a]) < 0.75
        seen[split] = set(prompts)
    assert not (seen["train"] & seen["heldout"] or seen["train"] & seen["demo"] or seen["heldout"] & seen["demo"])
    with pytest.raises(ValueError, match="split"):
        sample_prompts(1, seed=0, split="test")
    clip = sample_batch([0, 1], num_frames=1, size=(8, 8), split="demo")
    assert [split_of(a) for a in clip.attributes] == ["demo", "demo"]


def test_hand_held_is_the_same_scene_with_a_band_limited_shake() -> None:
    for seed in range(6):
        smooth, shaken = (sample_scene(seed, num_frames=129, shake=shake) for shake in ("smooth", "handheld"))
        for name in ("room", "focal", "shape", "half_size", "pose", "moves", "atlas", "light"):
            np.testing.assert_array_equal(getattr(smooth, name), getattr(shaken, name))
        assert smooth.caption == shaken.caption and (smooth.handheld, shaken.handheld) == (False, True)
        np.testing.assert_array_equal(smooth.cam2room[0], shaken.cam2room[0])
        move = (shaken.cam2room - smooth.cam2room)[:, :3, 3]
        assert 0.01 < move.std(0).mean() < 0.15
        power = np.abs(np.fft.rfft((move - move.mean(0)) * np.hanning(129)[:, None], axis=0)) ** 2
        frequency = np.fft.rfftfreq(129, 1 / FPS)
        assert power[(frequency > 0.5) & (frequency < 2.8)].sum() > 0.97 * power.sum()
        turn = torch.from_numpy(smooth.cam2room[:, :3, :3].swapaxes(1, 2) @ shaken.cam2room[:, :3, :3])
        assert 0.1 < torch.rad2deg(rotation_angle(turn)).max() < 15
    with pytest.raises(ValueError, match="shake"):
        sample_scene(0, shake="wild")


def test_footage_shakes_twice_as_much() -> None:
    shaken = 0
    for seed in range(60):
        smooth, handheld, footage = (sample_scene(seed, shake=kind) for kind in ("smooth", "handheld", "footage"))
        shaken += footage.handheld
        move, twice = (clip.cam2room[:, :3, 3] - smooth.cam2room[:, :3, 3] for clip in (handheld, footage))
        np.testing.assert_allclose(twice, 2 * move if footage.handheld else 0, atol=1e-9)
    assert 25 <= shaken <= 47


@pytest.mark.parametrize("move", CAMERA_MOVES)
def test_exact_geometry_is_consistent_and_wobble_is_not(move: str) -> None:
    exact = sample_batch([1, 2], num_frames=5, size=(64, 64), camera=move, supersample=1)
    still = wobble(exact, 0.0)
    torch.testing.assert_close(still.video, exact.video, rtol=0, atol=1e-4)
    assert torch.equal(still.depth, exact.depth) and torch.equal(still.object_id, exact.object_id)
    clips = (exact, wobble(exact, 1.0, seed=3), wobble(exact, 4.0, seed=3))
    e_geo = torch.stack([geometry_reprojection_consistency(c.geometry(1)).terms["e_geo"] for c in clips])
    assert (e_geo[0] < 1e-3).all() and (e_geo[0] < e_geo[1]).all() and (e_geo[1] < e_geo[2]).all(), e_geo


def test_slow_wobble_changes_as_much_from_key_to_key_and_less_in_between() -> None:
    static = [s for s in range(20) if not sample_scene(s, num_frames=9, camera="fixed").moves.any()][:2]
    exact = sample_batch(static, num_frames=9, camera="fixed", shake="smooth")
    quick, slow = (wobble(exact, 3.0, seed=2, period=period).video for period in (1, 4))
    step = {name: v.diff(dim=2).abs().mean().item() for name, v in (("quick", quick), ("slow", slow))}
    far = {name: v[:, :, ::4].diff(dim=2).abs().mean().item() for name, v in (("quick", quick), ("slow", slow))}
    assert step["slow"] < 0.6 * step["quick"] and far["slow"] == pytest.approx(far["quick"], rel=0.3)


def test_wobble_takes_an_amplitude_a_clip_and_thinned_truth() -> None:
    exact = sample_batch([1, 2], num_frames=5, size=(32, 32), supersample=1)
    bent = wobble(exact, torch.tensor([0.0, 3.0]), seed=1)
    assert torch.equal(bent.depth[0], exact.depth[0]) and not torch.equal(bent.depth[1], exact.depth[1])
    truth = exact.views(4)
    truth.video = exact.video  # as a training set holds it: every frame, and the truth of every fourth
    thinned = wobble(truth, torch.tensor([0.0, 3.0]), seed=1, truth_every=4)
    assert torch.equal(thinned.video, bent.video) and torch.equal(thinned.depth, bent.depth[:, ::4])
