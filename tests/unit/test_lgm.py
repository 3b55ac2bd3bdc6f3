"""The Latent Geometry Model: stitch points, files, refusals, gradients, and the closed-form connector."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from vggrpo.errors import UserError
from vggrpo.evaluation.lgm_cost import flops
from vggrpo.geometry import GeometryPrediction
from vggrpo.lgm import LatentGeometryModel, LGMConfig
from vggrpo.lgm.connector import Connector, at_view_rate
from vggrpo.lgm.search import neighbourhoods, search_layers
from vggrpo.models.vae import weights_hash
from vggrpo.models.vggt import VGGT, VGGTConfig

CHANNELS = 3


def tiny_vggt(**options: object) -> VGGT:
    torch.manual_seed(0)
    sizes = {"dim": 32, "heads": 2, "conv_layers": 1, "pairs": 2, "hooks": (1, 2), "head_features": 8}
    model = VGGT(VGGTConfig(**{**sizes, **options})).eval()
    nn.init.normal_(model.camera_head[-1].weight, std=0.1)  # views that differ, so that anchoring matters
    return model


def tiny_lgm(geometry: VGGT | None = None, **options: object) -> LatentGeometryModel:
    values = {"geometry": "../vggt", "vae": "test", "latent_channels": CHANNELS, "layer": 1, "lora_rank": 4}
    torch.manual_seed(1)
    return LatentGeometryModel(LGMConfig(**{**values, **options}), geometry or tiny_vggt()).eval()


def latents(views: int = 3, channels: int = CHANNELS, size: tuple[int, int] = (4, 5)) -> Tensor:
    return torch.randn(2, channels, views, *size, generator=torch.Generator().manual_seed(2))


def assert_same(one: GeometryPrediction, two: GeometryPrediction, tolerance: float = 0.0) -> None:
    for name in ("cam2world", "intrinsics", "depth", "points", "conf", "scene_flow"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=tolerance, atol=tolerance)


def saved(tmp_path: Path, **options: object) -> tuple[LatentGeometryModel, Path]:
    """A trained-looking LGM (its LoRA does something) and where it was written."""
    model = tiny_lgm(**options)
    model.geometry.save_pretrained(tmp_path / "vggt")
    model.add_lora()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "lgm")
    return model, tmp_path / "lgm"


@pytest.mark.parametrize("options", [{}, {"hooks": (2,)}, {"conv_layers": 0, "registers": 0, "hooks": (2,)}])
def test_every_stitch_point_resumes_to_the_whole_network(options: dict) -> None:
    model = tiny_vggt(**options)
    frames = torch.rand(2, 3, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(frames)
        points = model.stitch_points()
        assert points == list(range(1 + model.config.conv_layers + min(model.config.hooks)))
        for layer in points:
            tokens = model.tap(frames, layer)
            special, width = (1 + model.config.registers, 32) if layer else (0, 192)  # pixels have no special tokens
            assert tokens.shape == (2, 3, special + 12, width)
            assert (model.embed_dim(layer), model.special_tokens(layer).shape) == (width, (2, special, width))
            assert_same(model.resume(tokens, layer, (3, 4)), whole, 1e-5)
    assert whole.depth.shape == (2, 3, 24, 32) and (whole.depth > 0).all()


def test_the_first_tokens_of_a_conv_stem_are_the_pictures_patches() -> None:
    frames = torch.rand(1, 2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    tokens = tiny_vggt().tap(frames, 0)
    patch = frames[0, 1, :, 8:16, 24:32] * 2 - 1  # of the second row's last token
    torch.testing.assert_close(tokens[0, 1, 4 + 3], patch.flatten(), rtol=0, atol=0)


def test_cameras_are_anchored_rigid_and_the_last_flow_is_zero() -> None:
    frames = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = tiny_vggt()(frames)
    torch.testing.assert_close(out.cam2world[:, 0], torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-6)
    assert not torch.allclose(out.cam2world[:, 1], out.cam2world[:, 0], atol=1e-3)
    rotation = out.cam2world[..., :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), rtol=0, atol=1e-5)
    assert out.scene_flow is not None and (out.scene_flow[:, -1] == 0).all() and (out.scene_flow[:, 0] != 0).any()
    assert out.frame_index is not None and out.frame_index.tolist() == [0, 4, 8]


def test_frames_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="20x16"):
        tiny_vggt()(torch.rand(1, 2, 3, 20, 16))
    with pytest.raises(ValueError, match="B, S, 3, H, W"):
        tiny_vggt()(torch.rand(1, 3, 16, 16))


def test_vggt_survives_its_files_and_refuses_broken_ones(tmp_path: Path) -> None:
    model, frames = tiny_vggt(), torch.rand(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_same(VGGT.from_pretrained(tmp_path)(frames), model(frames))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(VGGT, tmp_path, "cannot be read")
    (tmp_path / "model.safetensors").unlink()
    refused(VGGT, tmp_path, "missing")
    refused(VGGT, tmp_path / "nowhere", "config.json is missing")


def test_an_lgm_refuses_other_weights_of_the_same_network(tmp_path: Path) -> None:
    geometry = tiny_vggt()
    _, directory = saved(tmp_path, geometry_sha256=weights_hash(geometry))
    LatentGeometryModel.from_pretrained(directory)
    nn.init.normal_(geometry.camera_head[-1].weight)
    geometry.save_pretrained(tmp_path / "vggt")
    refused(LatentGeometryModel, directory, "made on other weights than those of ../vggt now")


@pytest.mark.parametrize("options", [{}, {"layer": 0}, {"lora_rank": 0}])
def test_an_lgm_survives_its_files(tmp_path: Path, options: dict) -> None:
    model, directory = saved(tmp_path, **options)
    loaded = LatentGeometryModel.from_pretrained(directory)
    with torch.no_grad():
        want = model(latents())
        # The LoRA is folded in; displacement measured behind layer 0 makes more of its rounding on some processors.
        assert_same(loaded(latents()), want, 5e-4 if options.get("layer") == 0 else 1e-4)
        if model.config.lora_rank:  # what was compared depends on the LoRA
            assert not torch.allclose(tiny_lgm(**options)(latents()).depth, want.depth, rtol=1e-3)
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert loaded.config == model.config


def refused(kind: type, directory: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        kind.from_pretrained(directory)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_broken_files_are_one_line_to_the_user(tmp_path: Path) -> None:
    _, directory = saved(tmp_path)
    weights, config = directory / "model.safetensors", directory / "config.json"
    good, text = weights.read_bytes(), config.read_text()
    refused(LatentGeometryModel, tmp_path / "nowhere", "no latent geometry model")
    for broken in (good[:100], good[: len(good) // 2], b"", b"not weights"):
        weights.write_bytes(broken)
        refused(LatentGeometryModel, directory, "cannot be read")
    weights.unlink()
    refused(LatentGeometryModel, directory, "no latent geometry model")
    weights.write_bytes(good)
    for values in ({"latent_channels": CHANNELS + 1}, {"lora_rank": 2}):
        config.write_text(json.dumps(json.loads(text) | values))
        refused(LatentGeometryModel, directory, "do not fit")
    for values in ({"colour": "red"}, {"latent_channels": 0}, {"view_rate": "second"}):
        config.write_text(json.dumps(json.loads(text) | values))
        refused(LatentGeometryModel, directory, "cannot be read")
    config.write_text("{")
    refused(LatentGeometryModel, directory, "cannot be read")
    config.write_text(json.dumps(json.loads(text) | {"geometry": "../elsewhere"}))
    refused(LatentGeometryModel, directory, "no geometry model")
    config.write_text(text)
    LatentGeometryModel.from_pretrained(directory)


@pytest.mark.parametrize("part", ["special", "connector.conv.bias", "lora"])
def test_weights_that_lack_a_part_are_refused(tmp_path: Path, part: str) -> None:
    _, directory = saved(tmp_path)
    state = load_file(directory / "model.safetensors")
    del state[part if part in state else next(k for k in state if k.startswith(part))]
    save_file(state, directory / "model.safetensors")
    refused(LatentGeometryModel, directory, "do not fit")


def test_latents_that_do_not_fit_are_one_line_to_the_user() -> None:
    model = tiny_lgm()
    hole = latents()
    hole[1, 0, 2, 3, 1] = torch.nan
    for bad, words in (
        (hole, "NaN"),
        (hole.nan_to_num(torch.inf), "infinity"),
        (latents(channels=CHANNELS + 1), "latents of shape"),
        (latents()[0], "latents of shape"),
    ):
        with pytest.raises(UserError, match=words) as error:
            model(bad)
        assert "\n" not in str(error.value)


def test_gradients_reach_every_latent_and_only_what_is_trained() -> None:
    model = tiny_lgm()
    model.add_lora()
    z = latents().requires_grad_()
    out = model(z)
    (out.depth.log().square().mean() + out.cam2world.square().sum() + out.points.mean()).backward()
    assert z.grad is not None and z.grad.isfinite().all() and (z.grad.flatten(1).abs() > 0).float().mean() > 0.99
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all(name.startswith("connector.") or "lora_" in name for name in trained)


def test_the_gradient_is_the_slope() -> None:
    model = tiny_lgm().requires_grad_(False)
    z, step = latents().requires_grad_(), latents().flip(0)

    def value(x: Tensor) -> Tensor:
        out = model(x)
        return out.cam2world[..., :3, 3].double().square().sum() + out.depth.double().log().square().sum()

    (grad,) = torch.autograd.grad(value(z), z)
    with torch.no_grad():
        slope = (value(z + 1e-2 * step) - value(z - 1e-2 * step)) / 2e-2
    assert slope.abs() > 0.1
    torch.testing.assert_close((grad * step).sum().double(), slope, rtol=0.02, atol=0)


def test_view_rates() -> None:
    z = latents(views=3)
    with torch.no_grad():
        slow, fast = tiny_lgm()(z), tiny_lgm(view_rate="frame")(z)
    assert slow.depth.shape == (2, 3, 32, 40) and fast.depth.shape == (2, 9, 32, 40)
    assert slow.frame_index is not None and slow.frame_index.tolist() == [0, 4, 8]
    assert fast.frame_index is not None and fast.frame_index.tolist() == list(range(9))
    for views in (1, 2, 5):
        frames = at_view_rate(latents(views=views), "frame", 4)
        assert frames.shape[2] == 4 * (views - 1) + 1
        torch.testing.assert_close(frames[:, :, ::4], latents(views=views))  # a latent frame keeps its own RGB frame
    middle = at_view_rate(z, "frame", 4)[:, :, 2]
    torch.testing.assert_close(middle, (z[:, :, 0] + z[:, :, 1]) / 2)


@pytest.mark.parametrize("views", [1, 2, 3, 4, 5, 6, 21])
def test_the_connector_leaves_out_products_with_views_that_are_not_there(views: int) -> None:
    connector, z = Connector(CHANNELS, 7, 2), latents(views=views)
    torch.testing.assert_close(connector(z), connector.conv(z))
    under = sum(min(view + 3, views) - max(view - 2, 0) for view in range(views))
    assert flops(lambda: connector(z)) * 5 * views == flops(lambda: connector.conv(z)) * under


@pytest.mark.parametrize("stride", [1, 2])
def test_the_search_recovers_a_linear_relation_padding_included(stride: int) -> None:
    """Frames that are linear in the latents' neighbourhoods, through a stem that is linear in the frames."""
    geometry = tiny_vggt(patch_embed="patch", patch=8)
    decoder = nn.Conv3d(CHANNELS, 3 * 64, 5, (1, stride, stride), 2)
    generator = torch.Generator().manual_seed(5)

    @torch.no_grad()
    def pair() -> tuple[Tensor, Tensor]:
        z = torch.randn(4, CHANNELS, 3, 6 * stride, 6 * stride, generator=generator)
        frames = functional.pixel_shuffle(decoder(z).transpose(1, 2).flatten(0, 1), 8)
        return z, frames.unflatten(0, (4, 3))

    fits = search_layers(geometry, [pair() for _ in range(6)], [pair()], stride, ridge=1e-6)
    assert [fit.r2 for fit in fits] == sorted((fit.r2 for fit in fits), reverse=True)
    assert {fit.layer for fit in fits} == set(geometry.stitch_points())
    exact = next(fit for fit in fits if fit.layer == 0)
    assert exact.r2 > 0.99 and exact is fits[0]
    torch.testing.assert_close(exact.special, geometry.special.detach())
    z, frames = pair()
    turned = search_layers(geometry, [(z, frames)], [(z, frames)], stride, layers=[1, 0])
    for fit, same in zip(turned, search_layers(geometry, [(z, frames)], [(z, frames)], stride, [0, 1]), strict=True):
        assert fit.layer == same.layer and torch.equal(fit.weight, same.weight)
    connector = Connector(CHANNELS, geometry.embed_dim(0), stride)
    for fit in fits:
        fit.load_into(connector)
        with torch.no_grad():
            ran = connector(z).flatten(3).permute(0, 2, 3, 1).flatten(0, 2)
        # Rows of the regression hold the same neighbourhoods in the same order as the convolution, borders included.
        regression = neighbourhoods(z, stride) @ torch.cat([fit.weight.flatten(1).T, fit.bias[None]])
        torch.testing.assert_close(ran, regression, rtol=1e-4, atol=1e-4)
        if fit is exact:
            with torch.no_grad():
                tokens = geometry.tap(frames, 0)[:, :, geometry.special.shape[1] :].flatten(0, 2)
            torch.testing.assert_close(ran, tokens, rtol=0.01, atol=0.01)


def test_the_search_does_not_shrink_what_varies_little() -> None:
    """Channels of unequal spread, as normalised latents may have: the fit is as good as on equal ones."""
    geometry = tiny_vggt(patch_embed="patch", patch=8)
    decoder, spread = nn.Conv3d(CHANNELS, 3 * 64, 1), torch.tensor([1.0, 0.1, 0.01]).view(1, -1, 1, 1, 1)
    generator = torch.Generator().manual_seed(5)

    @torch.no_grad()
    def pair(scale: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.randn(4, CHANNELS, 3, 6, 6, generator=generator)
        frames = functional.pixel_shuffle(decoder(z).transpose(1, 2).flatten(0, 1), 8)
        return z * scale, frames.unflatten(0, (4, 3))

    scores = []
    for scale in (torch.ones_like(spread), spread):
        generator.manual_seed(5)
        pairs = [pair(scale) for _ in range(7)]
        scores += [fit.r2 for fit in search_layers(geometry, pairs[:6], pairs[6:], 1, layers=[0])]
    assert scores[0] > 0.99 and scores[1] == pytest.approx(scores[0], abs=1e-3)


def test_a_noise_level_gives_the_fit_of_many_noisy_copies() -> None:
    """Borders included: beyond them there is padding, and no noise."""
    geometry = tiny_vggt(patch_embed="patch", patch=8)
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(2, CHANNELS, 2, 3, 3, generator=generator)
    frames = torch.rand(2, 2, 3, 24, 24, generator=generator)
    copies = [(z + 0.5 * torch.randn(z.shape, generator=generator), frames) for _ in range(1000)]

    def solved(train: list[tuple[Tensor, Tensor]], noise: float) -> Tensor:
        return search_layers(geometry, train, [(z, frames)], 1, [0], ridge=1e-6, noise=noise)[0].weight

    sampled, closed, clean = solved(copies, 0.0), solved([(z, frames)], 0.5), solved([(z, frames)], 0.0)
    assert (closed - sampled).norm() < 0.1 * sampled.norm() < 0.1 * clean.norm()


def test_a_fitted_lgm_predicts_what_its_geometry_model_does() -> None:
    geometry = tiny_vggt(patch_embed="patch", patch=8)
    decoder = nn.Conv3d(CHANNELS, 3 * 64, 5, 1, 2)
    with torch.no_grad():
        z = torch.randn(16, CHANNELS, 3, 6, 6, generator=torch.Generator().manual_seed(6))
        frames = functional.pixel_shuffle(decoder(z).transpose(1, 2).flatten(0, 1), 8).unflatten(0, (16, 3))
        (fit,) = search_layers(geometry, [(z[:14], frames[:14])], [(z[14:], frames[14:])], 1, [0], ridge=1e-6)
        model = tiny_lgm(geometry, layer=0)
        fit.load_into(model.connector)
        got, want = model(z[14:]), geometry(frames[14:])
    torch.testing.assert_close(got.depth, want.depth, rtol=0.01, atol=0)
    torch.testing.assert_close(got.cam2world, want.cam2world, rtol=0, atol=0.01)


@torch.no_grad()
def test_first_names_of_layer_scale_still_load() -> None:
    """The embedded networks' first files call `ls1.gamma` plain `ls1`; nothing may change by a bit."""
    model, frames = tiny_vggt(), torch.rand(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma"):
            parameter.copy_(torch.linspace(-1, 1, 32))
    old = {name.removesuffix(".gamma"): value for name, value in model.state_dict().items()}
    assert "frame_blocks.0.ls1" in old
    other = tiny_vggt()
    other.load_state_dict(old)
    assert_same(other(frames), model(frames))
