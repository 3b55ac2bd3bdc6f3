"""Depth Anything 3 against its public implementation, with every parameter redrawn; the way into our conventions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from redraw import golden, picture, redraw, sample, unfolded
from safetensors.torch import save_file
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction, invert_se3
from vggrpo.lgm import LatentGeometryModel, LGMConfig
from vggrpo.models import GeometryModel, depth_anything3, dpt, load_geometry_model
from vggrpo.models import depth_anything3_layers as layers
from vggrpo.models.depth_anything3 import DepthAnything3, DepthAnything3Config
from vggrpo.models.depth_anything3_layers import AnyViewDino
from vggrpo.models.dinov2 import DinoConfig

GRID = (3, 5)
TURN = 2


def tiny() -> DepthAnything3:
    """Every parameter redrawn, then fields of view brought near those of a real lens."""
    encoder = DinoConfig(dim=32, depth=8, heads=4, position_grid=5, final_eps=1e-5, qk_norm_from=TURN)
    config = DepthAnything3Config(encoder=encoder, turn=TURN, hooks=(3, 4, 5, 7), features=16, widths=(8, 12, 16, 20))
    model = DepthAnything3(config).eval()
    redraw(model)
    with torch.no_grad():
        model.cam_dec.fc_fov[0].bias.fill_(1)
        model.cam_dec.fc_fov[0].weight /= 4
    return model.requires_grad_(False)


def clip() -> Tensor:
    """Two clips of four views, each of its own colour."""
    return picture(2, 4, 3, 14 * GRID[0], 14 * GRID[1]) * picture(2, 4, 3, 1, 1, seed=2)


def disagreement(prediction: GeometryPrediction) -> float:
    """Largest difference to the public implementation over all its outputs."""
    want = {name: torch.tensor(values) for name, values in golden("depth_anything_3.json")["outputs"].items()}
    world2cam = torch.eye(4).repeat(2, 4, 1, 1)
    world2cam[:, :, :3] = want["extrinsics"].view(2, 4, 3, 4)
    theirs = world2cam[:, :1] @ invert_se3(world2cam)  # of cam2world, anchored
    pairs = [
        (prediction.cam2world, theirs),
        (sample(prediction.depth), want["depth"]),
        (sample(prediction.conf), 1 - 1 / want["conf"]),
        (prediction.intrinsics.flatten() / 35, want["intrinsics"] / 35),
    ]
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def test_outputs_are_those_of_the_public_model() -> None:
    assert disagreement(tiny()(clip())) < 1e-4


def test_wrong_attention_or_missing_positions_break_the_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(name: str, owner: object, value: object) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            return disagreement(tiny()(clip()))

    plain = layers.rope_tables
    assert other("across_views", AnyViewDino, lambda self, index: index >= self.turn and index % 2 == 0) > 1e-2
    assert other("across_views", AnyViewDino, lambda self, index: False) > 1e-2
    assert other("_across_tables", layers, lambda patches, dim: plain((1, patches), 1, dim, 100.0)) > 1e-3
    assert other("rope_tables", layers, lambda grid, *rest: plain((1, math.prod(grid)), *rest)) > 1e-3
    assert other("positions", AnyViewDino, lambda self, grid: torch.zeros(1, 1 + math.prod(grid), 32)) > 1e-2
    assert other("place", dpt, lambda x, aspect: torch.zeros(())) > 1e-3


def test_the_first_view_leads_and_the_public_models_order_would_not_do() -> None:
    """The order of the others does not matter to the first; which view comes first does."""
    model, frames = tiny(), clip()
    whole, swapped, turned = model(frames), model(frames[:, [0, 2, 1, 3]]), model(frames[:, [1, 0, 2, 3]])
    torch.testing.assert_close(swapped.depth[:, [0, 2, 1, 3]], whole.depth, rtol=1e-4, atol=1e-4)
    assert (turned.depth[:, [1, 0, 2, 3]] - whole.depth).abs().max() > 1e-2


@pytest.mark.parametrize("size", ["small", "base"])
def test_names_and_shapes_are_those_of_the_public_checkpoints(size: str) -> None:
    public = unfolded(golden("depth_anything_3.json")[size])
    with torch.device("meta"):
        model = DepthAnything3(DepthAnything3Config.of_size(size))
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    left_out = {name for name in public if depth_anything3._LEFT_OUT.search(name)}
    assert ours == {name: shape for name, shape in public.items() if name not in left_out}
    assert all(name.startswith("cam_enc.") or "_aux." in name for name in left_out)


def test_public_weights_are_recognised_whatever_their_config_says(tmp_path: Path) -> None:
    """The small model as it is published: names behind `model.`, a config of the publisher's own, unused parts."""
    public = unfolded(golden("depth_anything_3.json")["small"])
    state = {f"model.{name}": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in public.items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_name": "da3-small", "config": {"net": {"name": "vits"}}}')
    model = load_geometry_model(tmp_path)
    assert isinstance(model, DepthAnything3) and model.config == DepthAnything3Config.of_size("small")
    large = {name: torch.zeros(1, 2, 1024) for name in state if name.endswith("camera_token")}
    save_file(large, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"small \(384\) and base \(768\)"):
        load_geometry_model(tmp_path)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_geometry_model(tmp_path)(clip()).points, model(clip()).points, rtol=0, atol=0)


def test_every_stitch_point_resumes_to_the_whole_network() -> None:
    model, frames = tiny(), clip()
    whole = model(frames)
    assert isinstance(model, GeometryModel) and model.stitch_points() == [0, 1, 2, 3]
    for layer in model.stitch_points():
        tokens = model.tap(frames, layer)
        special = model.special_tokens(layer)
        assert tokens.shape == (2, 4, special.shape[1] + math.prod(GRID), model.embed_dim(layer))
        resumed = model.resume(tokens, layer, GRID)
        for name in ("cam2world", "intrinsics", "depth", "points", "conf"):
            torch.testing.assert_close(getattr(resumed, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.tap(frames, 0)[:, :2, :1], model.special_tokens(0).expand(2, -1, -1, -1))
    assert not torch.equal(*model.special_tokens(TURN + 1))


def test_what_comes_out_follows_our_conventions() -> None:
    prediction = tiny()(clip())
    torch.testing.assert_close(prediction.cam2world[:, 0], torch.eye(4).expand(2, -1, -1), rtol=0, atol=1e-5)
    assert (prediction.depth > 0).all() and not prediction.is_metric
    assert (prediction.conf > 0).all() and (prediction.conf < 1).all()
    middle = torch.tensor([14 * GRID[1] / 2, 14 * GRID[0] / 2])
    torch.testing.assert_close(prediction.intrinsics[..., :2, 2], middle.expand(2, 4, -1))
    assert prediction.scene_flow is None and prediction.dynamic_mask is None


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
    config = LGMConfig(
        geometry="../geometry", vae="test", latent_channels=4, layer=3, lora_rank=2, backend="depth_anything_3"
    )
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
