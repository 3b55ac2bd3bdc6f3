"""The analysis of an LGM: accuracy, noise, cost; another VAE's latents; the plug's chunks; grids of real clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lgm_material import SIZE, BlockVAE, frames, teacher, write_videos
from torch import nn

from vggrpo import LatentGeometryReward
from vggrpo.errors import UserError
from vggrpo.evaluation import lgm_analysis
from vggrpo.evaluation.audit import samples_needed
from vggrpo.evaluation.lgm_analysis import Analysis, HeldOutClip, better_from
from vggrpo.evaluation.lgm_cost import cost_table, flops, reward_paths
from vggrpo.geometry import GeometryPrediction
from vggrpo.lgm import LatentGeometryModel, LGMConfig
from vggrpo.lgm.clips import Clip, Source
from vggrpo.lgm.connector import Connector, at_view_rate
from vggrpo.models import loading
from vggrpo.models.base import LatentSpec
from vggrpo.models.border import patch_image_size
from vggrpo.models.vae import vae_hash
from vggrpo.rewards.latent import WeightedLatentReward


def lgm(**options) -> LatentGeometryModel:
    values = {"geometry": "../vggt", "vae": "blocks", "latent_channels": 3, "lora_rank": 0, "spatial_stride": 8}
    torch.manual_seed(0)
    return LatentGeometryModel(LGMConfig(**{**values, **options}), teacher()).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clips():
    videos = [torch.from_numpy(frames(seed)).permute(3, 0, 1, 2).float() / 255 for seed in range(3)]
    return [HeldOutClip(video) for video in videos]


def test_accuracy_against_truth_and_against_the_rgb_model(clips):
    analysis = Analysis(lgm(), BlockVAE(), teacher())
    free = analysis.accuracy(clips)
    assert free.keys() == {"clips", "lgm_against_rgb"} and free["lgm_against_rgb"]["abs_rel"] > 0
    known = [HeldOutClip(clip.video, analysis.rgb_prediction(clip.video[None])) for clip in clips]
    judged = analysis.accuracy(known)
    assert judged["rgb"]["abs_rel"] < 1e-5 and judged["ratio"]["abs_rel"] > 100
    assert judged["lgm"] == pytest.approx(judged["lgm_against_rgb"], rel=1e-3, nan_ok=True)


def test_the_noise_curve_starts_at_the_clean_error_and_grows(clips):
    analysis = Analysis(lgm(), BlockVAE(), teacher())
    curve = analysis.noise_curve(clips, (0.0, 0.3, 3.0))
    assert curve == analysis.noise_curve(clips, (0.0, 0.3, 3.0))
    clean = analysis.accuracy(clips)["lgm_against_rgb"]
    assert curve["lgm"]["abs_rel"][0] == pytest.approx(clean["abs_rel"], rel=1e-4)
    assert curve["decode_then_rgb"]["rotation"][0] < curve["decode_then_rgb"]["rotation"][2]
    assert set(curve["lgm_better_from"]) <= set(lgm_analysis.SHOWN)


def test_better_from_is_the_level_from_which_on_it_holds():
    levels = (0.0, 0.1, 0.2, 0.4)
    assert better_from(levels, [1, 1, 1, 1], [0, 2, 2, 2]) == 0.1
    assert better_from(levels, [1, 1, 1, 1], [2, 2, 0, 2]) == 0.4
    assert better_from(levels, [1, 1, 1, 1], [2, 2, 2, 1]) is None


def numbered(name: str, clips: int, opened: list[str]) -> Source:
    """A video whose clip k is `clips` frames of the value k."""

    def cut():
        for k in range(clips):
            opened.append(f"{name}#{k}")
            yield Clip(f"{name}#{k}", torch.full((3, 5, 8, 8), k, dtype=torch.uint8))
        if not clips:
            raise UserError(f"{name} is short")

    return Source(name, cut)


@pytest.mark.parametrize(
    "videos, count, want",
    [
        ((12,), 10, {"a": 10}),  # of one video as many as are asked for
        ((9, 9, 9), 3, {"a": 1, "b": 1, "c": 1}),  # of several an even share each
        ((0, 2, 9), 6, {"b": 2, "c": 4}),  # what the first two lack, the third gives
        ((1, 2), 6, {"a": 1, "b": 2}),
    ],
)
def test_heldout_clips_are_as_many_as_asked_and_no_more_are_decoded(monkeypatch, caplog, videos, count, want):
    opened: list[str] = []

    def sources(path, *, clips_per_video=8, **shape):
        assert shape == {"num_frames": 5, "size": (8, 8)}
        return (numbered(name, min(n, clips_per_video), opened) for name, n in zip("abc", videos, strict=False))

    monkeypatch.setattr(lgm_analysis, "video_sources", sources)
    clips = lgm_analysis.heldout_clips("videos", count, num_frames=5, size=(8, 8), view_stride=4)
    assert len(clips) == sum(want.values())
    assert {name: len({key for key in opened if key[0] == name}) for name in want} == want
    assert ("has 3 clips of 5 frames, 6 were asked for" in caplog.text) == (len(clips) < count)


def test_a_video_gives_more_than_eight_clips_when_asked(tmp_path):
    write_videos(tmp_path, 1, length=10)
    assert len(lgm_analysis.heldout_clips(str(tmp_path), 10, num_frames=1, size=SIZE, view_stride=1)) == 10


def test_counting_at_full_shape_loads_nothing_and_renders_nothing(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("not needed")

    for place, name in ((loading, "load_vae"), (lgm_analysis, "load_analysis"), (lgm_analysis, "heldout_clips")):
        monkeypatch.setattr(place, name, never)
    rows = {"rgb": {"flops": 2, "flops_of_rgb": 1.0}}
    monkeypatch.setattr(lgm_analysis, "_full_shape_costs", lambda: {"Wan": rows})
    assert lgm_analysis.analyze_lgm("nowhere", tmp_path, parts=["full-shape"])["cost"] == {"Wan": rows}
    assert "Wan" in (tmp_path / "analysis.html").read_text()


def test_a_pipelines_vae_is_loaded_alone(monkeypatch):
    from diffusers import WanTransformer3DModel

    whole = loading.load_video_model("embedded", device="cpu", load_text=False)
    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", None)
    vae = loading.load_vae("embedded", device="cpu")
    assert not hasattr(vae, "transformer") and vae.latent_spec == whole.latent_spec
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = vae.encode_video(video)
    assert torch.equal(latents, whole.encode_video(video)) and torch.equal(vae.decode(latents), whole.decode(latents))


def test_flops_are_those_of_the_textbook_on_every_device():
    for device in ("cpu", "meta"):
        layer, x = nn.Linear(5, 7, device=device), torch.zeros(3, 5, device=device)
        assert flops(lambda layer=layer, x=x: layer(x)) == 2 * 3 * 5 * 7


def test_the_cost_table_counts_without_weights_what_it_counts_with_them():
    tables = []
    for device in ("cpu", "meta"):
        # After the stem: this VAE decodes for nothing, so the stem is all that an LGM can save.
        models = {rate: lgm(view_rate=rate, layer=1).to(device) for rate in ("latent", "frame")}
        latents = torch.zeros(1, 3, 3, 4, 6, device=device)
        paths = reward_paths(models, BlockVAE().to(device), teacher().to(device), latents)
        tables.append(cost_table(paths, torch.device(device), repeats=1))
    real, meta = tables
    assert list(meta) == ["rgb", "rgb_all_frames", "lgm_latent", "lgm_frame"]
    assert list(real) == [*meta, "rewards"] and real["rewards"]["seconds"] > 0
    assert real["rewards"]["flops"] < real["lgm_latent"]["flops"] / 10  # without the geometry that they read
    assert all(real[name]["flops"] == meta[name]["flops"] for name in meta)
    assert real["lgm_latent"]["flops"] < real["rgb"]["flops"] < real["rgb_all_frames"]["flops"]
    assert real["rgb"]["flops_of_rgb"] == 1 and real["rgb"]["seconds"] > 0 and "seconds" not in meta["rgb"]


def test_another_vaes_latents_are_refused():
    model = lgm(latents_mean=[0.0, 0.1, 0.2], latents_std=[1.0, 1.0, 1.0])
    same = {"mean": (0.0, 0.1, 0.2), "std": (1.0, 1.0, 1.0)}
    model.check_latents_of(LatentSpec(3, 4, 8, **same))
    model.check_latents_of(LatentSpec(3, 4, 8))  # one that does not say
    lgm(spatial_stride=None).check_latents_of(LatentSpec(3, 4, 16, **same))  # an LGM that does not say
    for spec, words in (
        (LatentSpec(16, 4, 8), "channels: 3 instead of 16"),
        (LatentSpec(3, 1, 8), "frames a latent frame: 4 instead of 1"),
        (LatentSpec(3, 4, 16), "pixels a latent cell: 8 instead of 16"),
        (LatentSpec(3, 4, 8, mean=(0.0, 0.1, 0.3), std=same["std"]), "latents_mean"),
        (LatentSpec(3, 4, 8, mean=same["mean"], std=(1.0, 1.0)), "latents_std"),
    ):
        with pytest.raises(UserError, match=words) as error:
            model.check_latents_of(spec)
        assert "train-lgm" in str(error.value) and "\n" not in str(error.value)


def test_a_vae_of_the_same_sizes_and_other_weights_is_refused():
    mine, other = BlockVAE(), BlockVAE()
    other.load_state_dict({name: value + 1 for name, value in mine.state_dict().items()})
    model = lgm(vae_sha256=vae_hash(mine))
    model.check_latents_of(mine.latent_spec, mine)
    lgm().check_latents_of(other.latent_spec, other)  # an LGM that does not say
    with pytest.raises(UserError, match="SHA-256 of its weights"):
        model.check_latents_of(other.latent_spec, other)


@pytest.mark.parametrize("size", [(480, 832), (704, 1280), (512, 512), (832, 480), (64, 64)])
@pytest.mark.parametrize("spatial, stride", [(8, 2), (16, 1)])
def test_tokens_are_16_pixels_at_every_aspect_ratio(size, spatial, stride):
    """The connector's grid is the one of a geometry model with patch 14 that sees the video at 14/16."""
    spec = LatentSpec(2, 4, spatial)
    _, t, h, w = spec.latent_shape(5, *size)
    grid = Connector(2, 4, stride)(torch.zeros(1, 2, t, h, w)).shape[-2:]
    assert tuple(grid) == (size[0] // 16, size[1] // 16)
    assert patch_image_size(size, 14) == (14 * grid[0], 14 * grid[1])


@pytest.mark.parametrize("count", [5, 17, 81, 121])
def test_every_length_of_4n_plus_1_has_its_views(count):
    _, t, _, _ = LatentSpec(2, 4, 8).latent_shape(count, 64, 64)
    assert at_view_rate(torch.zeros(1, 2, t, 1, 1), "latent", 4).shape[2] == (count + 3) // 4
    assert at_view_rate(torch.zeros(1, 2, t, 1, 1), "frame", 4).shape[2] == count
    with pytest.raises(UserError, match=r"4n\+1"):
        LatentSpec(2, 4, 8).latent_shape(count + 1, 64, 64)


class Narrow(nn.Module):
    """An LGM on a device that holds two clips."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = lgm(), []

    def forward(self, latents) -> GeometryPrediction:
        self.calls.append(len(latents))
        if len(latents) > 2:
            raise torch.cuda.OutOfMemoryError("no memory")
        return self.inner(latents)


def test_chunks_shrink_until_they_fit_and_change_nothing():
    latents = torch.randn(5, 3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    reward = LatentGeometryReward(Narrow(), chunk=16)
    got, want = reward(latents), LatentGeometryReward(lgm(), chunk=16)(latents)
    assert reward.lgm.calls == [5, 2, 2, 1] and reward.chunk == 2
    for name in want:
        torch.testing.assert_close(got[name], want[name], equal_nan=True, rtol=1e-4, atol=1e-5)
    reward.lgm.calls.clear()
    assert reward(latents).keys() == want.keys() and reward.lgm.calls == [2, 2, 1]  # it remembers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_latents_of_any_number_format_are_read(dtype):
    latents = torch.randn(2, 3, 3, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    got, want = LatentGeometryReward(lgm())(latents), LatentGeometryReward(lgm())(latents.float())
    assert all(torch.equal(got[name].nan_to_num(), want[name].nan_to_num()) for name in want)
    latents.requires_grad_()
    LatentGeometryReward(lgm(), differentiable=True)(latents)["motion"].sum().backward()
    assert latents.grad.dtype == dtype and latents.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "score",
    [
        lambda latents, **options: LatentGeometryReward(lgm(), **options)(latents),
        lambda latents, **options: WeightedLatentReward(lgm(), {"camera_motion_smoothness": 1}, **options)(latents, []),
    ],
    ids=["plug", "weighted"],
)
def test_no_clips_and_no_chunk_are_refused_in_one_line(score):
    latents = torch.zeros(0, 3, 3, 4, 6)
    for options, words in (({}, r"nothing to score.*\(0, 3, 3, 4, 6\)"), ({"chunk": 0}, "chunk is 0")):
        with pytest.raises(UserError, match=words) as error:
            score(latents, **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("channels", [32, 3])
def test_the_example_for_other_trainers_runs(monkeypatch, channels):
    if channels != 32:  # another LGM than the embedded one
        monkeypatch.setattr(LatentGeometryModel, "from_pretrained", lambda _: lgm(latent_channels=channels))
    text = (Path(__file__).parents[2] / "docs" / "use_our_reward.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) >= 2
    space: dict = {}
    for block in blocks:
        exec(block, space)
    assert space["rewards"].shape == (4,) and space["gradient"].abs().sum() > 0


def test_samples_needed():
    values = torch.tensor([8.0, 12.0] * 50)  # standard deviation a fifth of the mean
    needed = samples_needed(values)
    assert needed["20%"] == pytest.approx(16, abs=1) and needed["10%"] == pytest.approx(64, abs=2)
    assert samples_needed(torch.tensor([torch.nan, 1.0, 1.0]))["5%"] is None


def test_looking_at_a_model_does_not_keep_it_from_learning():
    """Tables that are kept between calls are made outside of inference mode."""
    from vggrpo.models.vit_layers import rope_tables

    rope_tables.cache_clear()
    latents = torch.zeros(1, 3, 2, 4, 6)
    with torch.inference_mode():
        lgm()(latents)
    lgm()(latents.requires_grad_()).depth.sum().backward()
    assert latents.grad is not None


def test_training_refuses_an_lgm_of_another_vae():
    from vggrpo.posttraining.trainer import load_lgm

    with pytest.raises(UserError, match=r"channels: 32 instead of 48"):
        load_lgm("embedded", torch.device("cpu"), LatentSpec(48, 4, 16))
