"""VGGT against its public implementation, with every parameter redrawn, and what must hold for any geometry model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from redraw import draw, golden, picture, sample, unfolded
from safetensors.torch import save_file
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.lgm import LatentGeometryModel, LGMConfig
from vggrpo.models import GeometryModel, load_geometry_model
from vggrpo.models.vggt import VGGT, VGGTConfig
from vggrpo.models.vggt_official import official_config, official_state

GOLDEN = golden("vggt.json")


def public_weights() -> dict[str, Tensor]:
    """A small public model's weights; its cameras are kept where quaternions and fields of view mean something."""
    state = {name: draw(name, torch.Size(shape)) for name, shape in unfolded(GOLDEN["small"]).items()}
    state["camera_head.pose_branch.fc2.weight"] *= 0.1
    state["camera_head.pose_branch.fc2.bias"][7:] = 0.25
    return state


def public(points: str = "depth") -> VGGT:
    return VGGT.from_checkpoint({"points": points}, public_weights())


def clip() -> Tensor:
    return picture(2, 3, 3, 42, 56)


def numbers(model: VGGT) -> dict[str, Tensor]:
    """What the golden file holds: outputs in the public model's own conventions."""
    seen: dict[str, Tensor] = {}
    model.camera_head.register_forward_hook(lambda *args: seen.update(pose=args[-1]))
    with torch.no_grad():
        prediction, raw = model.predict(clip())
    first = torch.tensor(GOLDEN["world2cam"]).view(2, 3, 3, 4)[:, :1]
    points = prediction.points - first[..., 3].view(2, 1, 1, 1, 3)
    return {
        "pose": sample(seen["pose"], 60),
        "depth": sample(prediction.depth),
        "intrinsics": sample(prediction.intrinsics, 54),
        ("points_conf" if model.config.points == "head" else "conf"): sample(1 + raw["conf_logit"].exp()),
        "points": sample((first[..., :3].mT[:, :, None, None] @ points[..., None])[..., 0]),
    }


def disagreement(got: dict[str, Tensor]) -> float:
    return max((value - torch.tensor(GOLDEN[name])).abs().max().item() for name, value in got.items())


def test_outputs_are_those_of_the_public_model() -> None:
    unprojected = numbers(public())
    unprojected.pop("points")  # the public model has no unprojected points: they are tested below
    assert disagreement(unprojected) < 1e-4
    assert disagreement(numbers(public("head"))) < 1e-4


def test_cameras_are_the_public_ones_seen_from_the_first() -> None:
    world2cam = torch.eye(4).repeat(2, 3, 1, 1)
    world2cam[..., :3, :] = torch.tensor(GOLDEN["world2cam"]).view(2, 3, 3, 4)
    with torch.no_grad():
        out = public()(clip())
    torch.testing.assert_close(out.cam2world, world2cam[:, :1] @ torch.linalg.inv(world2cam), rtol=0, atol=1e-4)
    pixel = torch.tensor([10.5, 20.5, 1.0])  # column 10, row 20 of the second view
    ray = torch.linalg.inv(out.intrinsics[0, 1]) @ pixel * out.depth[0, 1, 20, 10]
    want = out.cam2world[0, 1, :3, :3] @ ray + out.cam2world[0, 1, :3, 3]
    torch.testing.assert_close(out.points[0, 1, 20, 10], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", ["rope", "swap", "first view", "rectify", "rounds"])
def test_a_wrong_part_breaks_the_agreement(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = public()
    if wrong == "rope":
        monkeypatch.setattr("vggrpo.models.vit_layers.apply_rope", lambda x, *_: x)
    elif wrong == "swap":
        model.frame_blocks, model.global_blocks = model.global_blocks, model.frame_blocks
    elif wrong == "first view":
        model.special.copy_(model.special.flip(0))
    elif wrong == "rectify":
        for module in model.depth_head.modules():
            module.rectified = False
    else:
        monkeypatch.setattr("vggrpo.models.vggt_camera._ROUNDS", 3)
    got = numbers(model)
    assert disagreement({name: got[name] for name in ("pose", "depth")}) > 1e-2


def test_names_and_shapes_are_those_of_the_public_model() -> None:
    """At full size, and sizes are read off the weights; the tracker and DINOv2's mask token are left out."""
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in unfolded(GOLDEN["full"]).items()}
        config = VGGTConfig(**official_config(state), points="head")
        ours = VGGT(config).state_dict()
    want = {name: value.shape for name, value in official_state(state, point_head=True).items()}
    assert {name: value.shape for name, value in ours.items()} == want
    assert (config.dim, config.heads, config.pairs, config.encoder_layers, config.registers) == (1024, 16, 24, 24, 4)
    assert config.hooks == (5, 12, 18, 24) and (config.patch, config.position_grid, config.mlp_ratio) == (14, 37, 4.0)
    assert config.head_features == 256 and config.head_widths == (256, 512, 1024, 1024) and config.rope_base == 100
    total = sum(value.numel() for value in ours.values())
    assert 0.9e9 < total < 1.3e9  # "1B"


def test_public_files_load_and_broken_ones_are_one_line(tmp_path: Path) -> None:
    state = public_weights()
    unused = {"track_head.norm.weight": torch.ones(2), "aggregator.patch_embed.mask_token": torch.ones(1, 32)}
    torch.save({"model": state | unused}, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text('{"img_size": 70, "patch_size": 14, "embed_dim": 32}')  # as the hub has it
    model = load_geometry_model(tmp_path)
    assert isinstance(model, VGGT) and isinstance(model, GeometryModel) and numbers(model)
    model.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(load_geometry_model(tmp_path / "ours")(clip()).depth, model(clip()).depth)
    for missing, words in (
        ("aggregator.global_blocks.1.attn.qkv.weight", r"1 missing \(global_blocks.1.attn.qkv.weight\)"),
        ("aggregator.register_token", "lack aggregator.register_token"),
    ):
        save_file({k: v for k, v in state.items() if k != missing}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=words) as error:
            load_geometry_model(tmp_path / "model.safetensors")
        assert "\n" not in str(error.value)


def test_every_stitch_point_resumes_to_the_whole_network() -> None:
    model = public()
    with torch.no_grad():
        whole = model(clip())
        assert model.stitch_points() == [0, 1, 2]  # two blocks of DINOv2; the heads read after the first pair
        for layer in model.stitch_points():
            tokens = model.tap(clip(), layer)
            assert tokens.shape == (2, 3, 5 + 12, model.embed_dim(layer))
            assert model.special_tokens(layer).shape == (2, 5, 32)
            got = model.resume(tokens, layer, (3, 4))
            for name in ("cam2world", "intrinsics", "depth", "points", "conf"):
                torch.testing.assert_close(getattr(got, name), getattr(whole, name), rtol=1e-4, atol=1e-4)
        for layer in (0, 2):  # here special tokens are exact
            special = model.tap(clip(), layer)[:, :, :5]
            want = model.special_tokens(layer)[[0, 1, 1]].expand(2, -1, -1, -1)
            torch.testing.assert_close(special, want)


def test_later_hooks_allow_stitching_inside_the_trunk() -> None:
    values = official_config(public_weights()) | {"pairs": 5, "hooks": (2, 3, 4, 5)}
    torch.manual_seed(0)
    model = VGGT(VGGTConfig(**values)).eval()
    with torch.no_grad():
        assert model.stitch_points() == [0, 1, 2, 3]
        got, want = model.resume(model.tap(clip(), 3), 3, (3, 4)), model(clip())
    torch.testing.assert_close(got.depth, want.depth)


def test_an_lgm_on_the_public_model_learns_in_its_own_sizes(tmp_path: Path) -> None:
    geometry = public()
    geometry.save_pretrained(tmp_path / "geometry")
    config = LGMConfig(geometry="../geometry", vae="test", latent_channels=4, layer=2, stride=2, lora_rank=2)
    lgm = LatentGeometryModel(config, geometry)
    lgm.add_lora()
    latents = picture(1, 4, 2, 6, 8).requires_grad_()
    out = lgm(latents)
    assert out.depth.shape == (1, 2, 42, 56)  # 48x64 pixels of video: 6x8 latents, 3x4 tokens
    (out.depth.log().mean() + out.cam2world.square().sum()).backward()
    assert latents.grad is not None and latents.grad.isfinite().all() and (latents.grad != 0).all()
    lgm.save_pretrained(tmp_path / "lgm")
    with torch.no_grad():
        again = LatentGeometryModel.from_pretrained(tmp_path / "lgm")(latents)
    torch.testing.assert_close(again.depth, out.depth.detach(), rtol=1e-4, atol=1e-4)


def test_layers_are_walked_in_one_pass_and_only_heads_safe_ones_are_entered() -> None:
    model = public()
    with torch.no_grad():
        walked = list(model.walk(clip()))
        assert len(walked) == len(model.stitch_points())
        for layer, tokens in enumerate(walked):
            torch.testing.assert_close(tokens, model.tap(clip(), layer), rtol=0, atol=0)
    config = LGMConfig(geometry="there", vae="test", latent_channels=4, layer=3)
    with pytest.raises(UserError, match=r"layer is 3, but the heads of there .* choose one of 0 to 2"):
        LatentGeometryModel(config, model)


@torch.no_grad()
def test_half_precision_one_view_and_the_meta_device() -> None:
    model = public()
    want = model(clip())
    with torch.autocast("cpu", torch.bfloat16):
        half = model(clip())
    assert half.depth.dtype == half.cam2world.dtype == torch.float32  # heads run in full precision
    torch.testing.assert_close(half.depth, want.depth, rtol=0.05, atol=0.05)
    assert not torch.equal(half.depth, want.depth)
    single = model(clip()[:, :1])
    assert single.depth.shape == (2, 1, 42, 56)
    torch.testing.assert_close(single.cam2world[:, 0], torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-6)
    assert model.to("meta")(clip().to("meta")).points.shape == (2, 3, 42, 56, 3)


def test_sizes_and_lora_targets() -> None:
    model = public()
    assert model.image_size_for((480, 832)) == (420, 728) and model.image_size_for((704, 1280)) == (616, 1120)
    assert VGGT(VGGTConfig()).image_size_for((64, 64)) == (64, 64)
    names = [name for name, _ in model.named_modules()]
    for target in model.lora_targets():
        assert any(name == target or name.endswith(f".{target}") for name in names), target


def test_config_fields_that_do_not_fit_together_are_named() -> None:
    for values, words in (
        ({"patch_embed": "dinov2", "conv_layers": 2}, "conv_layers is 2"),
        ({"decoder": "dpt", "hooks": (1, 2)}, "reads four layers"),
        ({"points": "head"}, "light decoder"),
        ({"patch": 16}, "tokens of 8 pixels"),
    ):
        with pytest.raises(ValidationError, match=words):
            VGGTConfig(**values)
