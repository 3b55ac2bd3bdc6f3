"""Any4D against its public implementation, with every parameter redrawn, and the way into our conventions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from redraw import golden, picture, redraw, sample, unfolded
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction, pixel_rays, project, unproject
from vggrpo.lgm import LatentGeometryModel, LGMConfig
from vggrpo.models import GeometryModel, any4d, load_geometry_model
from vggrpo.models.any4d import Any4D, Any4DConfig
from vggrpo.models.any4d_geometry import intrinsics_from_rays, motion_on_each_view, to_prediction, z_depth
from vggrpo.models.any4d_layers import Trunk
from vggrpo.models.border import rigid, rotation_from_xyzw
from vggrpo.models.dinov2 import DinoConfig, DinoV2

GRID = (3, 5)


def tiny() -> Any4D:
    """Every parameter redrawn, then the bias of the rays' z raised: rays look forward in a real model, too."""
    encoder = DinoConfig(dim=32, depth=3, heads=4, position_grid=5)
    sizes = {"dim": 48, "heads": 4, "layers": 6, "hooks": (2, 3), "widths": (8, 12, 16, 20), "features": 16}
    model = Any4D(Any4DConfig(encoder=encoder, scale_hidden=12, **sizes)).eval()
    redraw(model, seed=6)  # half of the pixels are ambiguous
    with torch.no_grad():
        model.dpt_regressor_head.conv2[2].bias[2] += 4
    return model.requires_grad_(False)


def clip() -> Tensor:
    """Two clips of three views, each of its own colour."""
    return picture(2, 3, 3, 14 * GRID[0], 14 * GRID[1]) * picture(2, 3, 3, 1, 1, seed=2)


@pytest.fixture
def raw(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What the network hands to the conversion, in the public model's terms."""
    seen: dict[str, Tensor] = {}

    def spy(rays, distance, conf, cam2world, flow, **options):
        seen.update(rays=rays, distance=distance, conf=conf, cam2world=cam2world, flow=flow)
        return to_prediction(rays, distance, conf, cam2world, flow, **options)

    monkeypatch.setattr(any4d, "to_prediction", spy)
    return seen


def disagreement(seen: dict[str, Tensor]) -> float:
    """Largest difference to the public implementation over all its outputs."""
    want = {name: torch.tensor(values) for name, values in golden("any4d.json")["outputs"].items()}
    pairs = [(sample(seen[name]), want[name]) for name in ("rays", "distance")]
    flow = seen["flow"]
    later = sample(torch.ones_like(flow).cumsum(1) > 1)  # nothing has moved in view 0, whatever its flow head would say
    assert not flow[:, 0].any() and later.sum() > 20
    pairs.append((sample(flow)[later], want["flow"][later]))
    pairs.append((sample(seen["conf"]), (1 - 1 / want["conf"]) * want["unambiguous"]))
    pairs.append((sample(seen["cam2world"][..., :3, 3]), want["translation"]))
    turn = rotation_from_xyzw(want["quaternion"].unflatten(0, (-1, 4)))  # (2 x 3, 3, 3)
    pairs.append((seen["cam2world"][..., :3, :3].flatten(0, 1), turn))
    points = torch.einsum(
        "bsij,bshwj->bshwi", seen["cam2world"][..., :3, :3], seen["rays"] * seen["distance"][..., None]
    )
    pairs.append((sample(points + seen["cam2world"][..., None, None, :3, 3]), want["points"]))
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def test_outputs_are_those_of_the_public_model(raw: dict[str, Tensor]) -> None:
    tiny()(clip())
    assert disagreement(raw) < 1e-4


def test_wrong_attention_or_missing_positions_break_the_agreement(
    raw: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    model.info_sharing.view_pos_table.zero_()
    model(clip())
    assert disagreement(raw) > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(Trunk, "across_views", staticmethod(lambda index: index % 2 == 1))
        tiny()(clip())
        assert disagreement(raw) > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(
            DinoV2, "positions", lambda self, grid: torch.zeros_like(self.pos_embed[:, : 1 + math.prod(grid)])
        )
        tiny()(clip())
        assert disagreement(raw) > 1e-2


def test_names_and_shapes_are_those_of_the_public_checkpoint() -> None:
    public = unfolded(golden("any4d.json")["keys"])
    with torch.device("meta"):
        ours = {name: tuple(value.shape) for name, value in Any4D(Any4DConfig()).state_dict().items()}
    left_out = {name for name in public if any4d._LEFT_OUT.search(name)}
    assert ours == {name: shape for name, shape in public.items() if name not in left_out}
    assert {name.split(".")[0] for name in left_out if "input_process" not in name and "layer_rn" not in name} == {
        *("dense_head", "scene_flow_dense_head", "ray_dirs_encoder", "depth_encoder", "depth_scale_encoder"),
        *("cam_rot_encoder", "cam_trans_encoder", "cam_trans_scale_encoder", "scene_flow_encoder"),
    }


def test_a_public_checkpoint_loads_and_a_foreign_one_says_what_is_missing() -> None:
    model = tiny()
    config = model.config.model_dump()
    extras = {"dense_head.0.x": torch.zeros(1), "ray_dirs_encoder.conv_in.bias": torch.zeros(1)}
    extras["dpt_feature_head.scratch.layer_rn.0.weight"] = torch.zeros(1)
    again = Any4D.from_checkpoint(config, model.state_dict() | extras)
    torch.testing.assert_close(again(clip()).depth, model(clip()).depth, rtol=0, atol=0)
    state = model.state_dict()
    del state["scale_token"]
    with pytest.raises(ValueError, match=r"1 missing \(scale_token\)"):
        Any4D.from_checkpoint(config, state)


def test_what_was_saved_is_loaded_also_from_one_file_of_any_name(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_geometry_model(tmp_path)(clip()).points, model(clip()).points, rtol=0, atol=0)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "any4d_4v_combined.pth")
    torch.testing.assert_close(load_geometry_model(tmp_path)(clip()).points, model(clip()).points, rtol=0, atol=0)
    torch.save({}, tmp_path / "another.pth")
    with pytest.raises(UserError, match="missing"):
        load_geometry_model(tmp_path)


def test_every_stitch_point_resumes_to_the_whole_network() -> None:
    model, frames = tiny(), clip()
    whole = model(frames)
    assert isinstance(model, GeometryModel) and model.stitch_points() == [0, 1, 2, 3]
    for layer in model.stitch_points():
        tokens = model.tap(frames, layer)
        special = model.special_tokens(layer)
        assert tokens.shape == (2, 3, special.shape[1] + math.prod(GRID), model.embed_dim(layer))
        resumed = model.resume(tokens, layer, GRID)
        for name in ("cam2world", "intrinsics", "depth", "points", "conf", "scene_flow", "dynamic_mask"):
            torch.testing.assert_close(getattr(resumed, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.tap(frames, 0)[:, :2, :1], model.special_tokens(0).expand(2, -1, -1, -1))


def test_what_comes_out_follows_our_conventions() -> None:
    prediction = tiny()(clip())
    torch.testing.assert_close(prediction.cam2world[:, 0], torch.eye(4).expand(2, -1, -1), rtol=0, atol=1e-5)
    assert (prediction.depth > 0).all() and prediction.is_metric
    assert (prediction.conf >= 0).all() and (prediction.conf <= 1).all() and (prediction.conf == 0).any()
    assert not prediction.scene_flow[:, -1].any()
    unknown_or_still = prediction.scene_flow.norm(dim=-1) == 0
    assert (prediction.dynamic_mask | unknown_or_still).all()


def test_half_precision_in_the_trunk_leaves_the_heads_in_full() -> None:
    model, frames = tiny(), clip()
    whole = model(frames)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(frames)
    for field in ("cam2world", "intrinsics", "depth", "points", "conf"):
        assert getattr(half, field).dtype == torch.float32
    assert 1e-6 < ((half.depth - whole.depth).abs() / whole.depth).median() < 0.1


def test_an_lgm_around_it_loads_again_and_its_gradient_reaches_the_latents(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "geometry")
    config = LGMConfig(geometry="../geometry", vae="test", latent_channels=4, layer=2, lora_rank=2, backend="any4d")
    lgm = LatentGeometryModel(config, model)
    lgm.add_lora()
    lgm.save_pretrained(tmp_path / "lgm")
    latents = picture(1, 4, 3, *GRID).requires_grad_()
    prediction = lgm(latents)
    torch.testing.assert_close(
        LatentGeometryModel.from_pretrained(tmp_path / "lgm")(latents).depth, prediction.depth, rtol=1e-5, atol=1e-5
    )
    (prediction.depth.log().mean() + prediction.cam2world[:, 1:].square().mean()).backward()
    assert latents.grad.isfinite().all() and latents.grad.abs().amax((0, 1, 3, 4)).min() > 0


def test_lora_targets_match_and_sizes_keep_the_videos_tokens() -> None:
    model = tiny()
    names = [name for name, _ in model.named_modules()]
    for target in model.lora_targets():
        assert any(name == target or name.endswith("." + target) for name in names), target
    assert model.image_size_for((480, 832)) == (420, 728)
    assert model.image_size_for((704, 1280)) == (616, 1120)
    with pytest.raises(UserError, match="patches of 14"):
        model.tap(torch.zeros(1, 2, 3, 40, 70), 0)


# --- conversions with known answers ---


def camera(height: int = 24, width: int = 32) -> Tensor:
    return torch.tensor([[20.0, 0.0, width / 2 + 1], [0.0, 22.0, height / 2 - 2], [0.0, 0.0, 1.0]])


def test_intrinsics_come_back_from_rays_and_backward_rays_take_no_part() -> None:
    rays = torch.nn.functional.normalize(pixel_rays(camera(), (24, 32)), dim=-1)
    torch.testing.assert_close(intrinsics_from_rays(rays), camera(), rtol=1e-5, atol=1e-4)
    spoiled = rays.clone()
    spoiled[3:7, 5:20] *= -1
    spoiled[0, 0] = torch.tensor([1.0, 0.0, 0.01])
    torch.testing.assert_close(intrinsics_from_rays(spoiled), camera(), rtol=1e-5, atol=1e-4)
    assert intrinsics_from_rays(-rays)[0, 0].isnan()


def test_gradients_of_intrinsics() -> None:
    rays = pixel_rays(camera(4, 5).double(), (4, 5)) + 0.01 * torch.arange(60.0).view(4, 5, 3).double().sin()
    assert torch.autograd.gradcheck(intrinsics_from_rays, rays.requires_grad_())


def test_depth_along_rays_of_a_plane() -> None:
    """The plane n . X = 3 meets the ray at distance 3 / (n . ray); its z-depth is linear in x/z and y/z, inverted."""
    slopes = pixel_rays(camera(), (24, 32))
    rays = slopes / slopes.norm(dim=-1, keepdim=True)
    normal = torch.tensor([0.3, -0.2, 0.9])
    depth, known = z_depth(3 / (rays @ normal), rays)
    torch.testing.assert_close(1 / depth, (0.3 * slopes[..., 0] - 0.2 * slopes[..., 1] + 0.9) / 3, rtol=1e-5, atol=1e-6)
    assert known.all()
    depth, known = z_depth(torch.ones(2), torch.tensor([[0.0, 0.0, -1.0], [0.9999, 0.0, 0.01]]))
    assert not known.any() and (depth > 0).all()


def test_a_quarter_turn_as_a_quaternion_xyzw() -> None:
    half = math.sqrt(0.5)
    turn = rotation_from_xyzw(2 * torch.tensor([0.0, 0.0, half, half]))  # of any length
    torch.testing.assert_close(turn @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]), rtol=0, atol=1e-6)


def test_the_first_view_becomes_the_world_and_flow_turns_with_it() -> None:
    """Any4D's world is turned by 90 degrees about z and shifted: a thing that moves along its y moves along our x."""
    half = math.sqrt(0.5)
    world = rigid(rotation_from_xyzw(torch.tensor([0.0, 0.0, half, half])), torch.tensor([1.0, 2.0, 3.0]))
    ours = torch.eye(4).repeat(1, 2, 1, 1)
    ours[0, 1, 0, 3] = 0.5
    rays = torch.nn.functional.normalize(pixel_rays(camera(), (24, 32)), dim=-1).expand(1, 2, -1, -1, -1)
    flow = torch.zeros(1, 2, 24, 32, 3)
    flow[:, 1, ..., 1] = 0.5
    conf, limits = torch.ones(1, 2, 24, 32), {"motion_threshold": 0.1, "hidden_tolerance": 0.05}
    prediction, turned = to_prediction(rays, 2 / rays[..., 2], conf, world @ ours, flow, **limits)
    torch.testing.assert_close(prediction.cam2world, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction.depth, torch.full((1, 2, 24, 32), 2.0), rtol=1e-5, atol=0)
    want = torch.tensor([0.5, 0.0, 0.0]).expand(24, 32, 3)
    torch.testing.assert_close(prediction.scene_flow[0, 0], want, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned[0, 1], want, rtol=0, atol=1e-5)


VIEWS, SIZE, WALL, BOX = 3, (24, 32), 4.0, 2.0
CAMERA_STEP, BOX_STEP = 0.3, 0.5


def stage() -> tuple[GeometryPrediction, Tensor, Tensor]:
    """A wall, a box that slides along x in front of it, a camera that slides too; flow of view 0; where the box is."""
    cam2world = torch.eye(4).repeat(1, VIEWS, 1, 1)
    cam2world[0, :, 0, 3] = CAMERA_STEP * torch.arange(VIEWS)
    intrinsics = camera().expand(1, VIEWS, -1, -1)
    at_box = unproject(torch.full((1, VIEWS, *SIZE), BOX), intrinsics, cam2world)
    middle = (BOX_STEP * torch.arange(VIEWS))[None, :, None, None]
    box = ((at_box[..., 0] - middle).abs() < 0.4) & (at_box[..., 1].abs() < 0.3)
    depth = torch.where(box, BOX, WALL)
    flow = torch.zeros(1, VIEWS, *SIZE, 3)
    flow[..., 0] = BOX_STEP * torch.arange(VIEWS)[None, :, None, None] * box[:, :1]
    return GeometryPrediction.from_depth(cam2world, intrinsics, depth), flow, box


def eroded(mask: Tensor) -> Tensor:
    """Without the pixels next to the border of the mask."""
    return -torch.nn.functional.max_pool2d(-mask.float(), 3, 1, 1) > 0.5


def test_a_moving_box_seen_from_view_0_gives_masks_and_flow_in_every_view() -> None:
    truth, flow, box = stage()
    scene_flow, dynamic = motion_on_each_view(truth, flow, motion_threshold=0.02, hidden_tolerance=0.05)
    wall_points = truth.points.flatten(1, 3)
    uv, _ = project(wall_points, truth.intrinsics[:, :1], truth.cam2world[:, :1])
    u, v = (uv[0, 0, :, axis].view(1, VIEWS, *SIZE) for axis in (0, 1))
    inside = (u > 1) & (u < SIZE[1] - 1) & (v > 1) & (v < SIZE[0] - 1)
    row, column = v.long().clamp(0, SIZE[0] - 1), u.long().clamp(0, SIZE[1] - 1)
    grown = torch.nn.functional.max_pool2d(box[:, 0].float(), 3, 1, 1)[0] > 0
    near_box_in_0, in_box_in_0 = grown[row, column] & inside, eroded(box[:, 0])[0][row, column] & inside
    for view in range(VIEWS):
        inner, outer = eroded(box[:, view])[0], eroded(~box[:, view])[0]
        assert dynamic[0, view][inner].all()
        still = outer & inside[0, view] & ~near_box_in_0[0, view]
        assert still.sum() > 300 and not dynamic[0, view][still].any()
        hidden_in_0 = outer & in_box_in_0[0, view]
        outside_in_0 = outer & ((u < -1) | (u > SIZE[1] + 1))[0, view]
        assert dynamic[0, view][hidden_in_0 | outside_in_0].all()
        assert view < 2 or (hidden_in_0.any() and outside_in_0.any())
        step = torch.tensor([BOX_STEP if view < VIEWS - 1 else 0.0, 0.0, 0.0])
        torch.testing.assert_close(scene_flow[0, view][inner], step.expand(int(inner.sum()), 3), rtol=0, atol=1e-5)
        assert not scene_flow[0, view][~inner & still].any()


def test_noise_under_the_threshold_is_no_motion() -> None:
    truth, flow, _ = stage()
    noise = 0.01 * torch.randn(flow.shape, generator=torch.Generator().manual_seed(0)).clamp(-1.5, 1.5)
    scene_flow, dynamic = motion_on_each_view(truth, 0 * flow + noise, motion_threshold=0.02, hidden_tolerance=0.05)
    assert not scene_flow.any() and not dynamic[:, 0].any()
    _, dynamic = motion_on_each_view(truth, 0 * flow + noise, motion_threshold=1e-4, hidden_tolerance=0.05)
    assert dynamic[:, 0].float().mean() > 0.9


def test_the_threshold_knows_known_depths_only() -> None:
    """Most of view 0 is unknown and claims a tiny depth: small motion of the rest stays under the threshold."""
    truth, flow, _ = stage()
    noise = 0.01 * torch.randn(flow.shape, generator=torch.Generator().manual_seed(0)).clamp(-1.5, 1.5)
    truth.conf[:, 0, :, SIZE[1] // 3 :] = 0
    truth.depth[:, 0, :, SIZE[1] // 3 :] = 1e-3
    scene_flow, _ = motion_on_each_view(truth, 0 * flow + noise, motion_threshold=0.02, hidden_tolerance=0.05)
    assert not scene_flow.any()


def test_a_wall_that_drew_back_is_an_error_and_not_unknown_but_one_in_front_hides() -> None:
    truth, flow, _ = stage()
    truth.depth[:] = truth.depth[:, :1]
    truth.cam2world[:] = torch.eye(4)
    for factor, excluded in ((1.3, False), (0.7, True)):
        bent = GeometryPrediction.from_depth(truth.cam2world, truth.intrinsics, truth.depth.clone())
        bent.depth[:, 2] *= factor
        _, dynamic = motion_on_each_view(bent, 0 * flow, motion_threshold=0.02, hidden_tolerance=0.05)
        assert not dynamic[:, :2].any()
        assert dynamic[:, 2].float().mean() == float(excluded)


def test_flow_without_a_known_point_is_unknown_and_gradients_reach_all_other_flow() -> None:
    truth, flow, box = stage()
    truth.conf[0, 0, :5] = 0
    flow.requires_grad_()
    scene_flow, dynamic = motion_on_each_view(truth, flow, motion_threshold=0.02, hidden_tolerance=0.05)
    assert dynamic[0, 0, :5].all() and not scene_flow[0, 0, :5].any()
    scene_flow[:, 0].sum().backward()
    assert (scene_flow[0, 0][~box[0, 0]] == 0).all() and (scene_flow[0, 0][box[0, 0]] != 0).any()
    assert (flow.grad[0, 1, 5:] == 1).all() and not flow.grad[:, :, :5].any()  # of what does not move (yet), too
