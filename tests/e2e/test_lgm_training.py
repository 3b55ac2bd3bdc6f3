"""`vggrpo train-lgm` from cache to model: the search's order, exact resume, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from lgm_material import FRAMES, SIZE, BlockVAE, teacher, write_videos
from safetensors.torch import load_file, save_file

from vggrpo.checkpoint import load_latest
from vggrpo.config_lgm import load_lgm_config
from vggrpo.distributed import Processes
from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction
from vggrpo.lgm import LatentGeometryModel, losses
from vggrpo.lgm import training as lgm_training
from vggrpo.lgm.cache import CachedClips
from vggrpo.lgm.clips import Clip
from vggrpo.lgm.losses import distillation_loss
from vggrpo.lgm.search import StitchFit, load_fit, save_fit
from vggrpo.lgm.training import draw_batch, warmup_cosine
from vggrpo.models.vggt import VGGT
from vggrpo.pretraining import distill

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Videos, a saved teacher, and one finished run of six updates."""
    root = tmp_path_factory.mktemp("lgm")
    write_videos(root / "videos", 6)
    teacher().save_pretrained(root / "vggt")
    train(root, "whole")
    return root


def config(root, name, *overrides):
    values = {
        "output": str(root / name), "cache": str(root / "cache"), "updates": 6, "save_every": 3,
        "geometry": {"path": str(root / "vggt")},
        "clips": {"videos": str(root / "videos"), "num_frames": FRAMES, "height": SIZE[0], "width": SIZE[1],
                  "generated_share": 0, "heldout_share": 0.3, "shard_size": 4},
        "stitch": {"layers": [0, 1]},
        "distill": {"batch": 4, "lora_rank": 2, "lora_alpha": 2, "warmup_updates": 2, "learning_rate": 1e-3},
    }  # fmt: skip
    return load_lgm_config(values, overrides)


def train(root, name, *overrides, **options):
    """The whole command, but for the VAE, which is a stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "load_video_model", lambda *a, **k: BlockVAE())
        return distill.train_lgm(config(root, name, *overrides), progress=False, **options)


def rows(path):
    kept = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in kept]


def test_the_result_is_an_lgm_with_its_manifest(place):
    model = LatentGeometryModel.from_pretrained(place / "whole" / "lgm")
    assert (model.config.latent_channels, model.config.temporal_stride, model.config.spatial_stride) == (3, 4, 8)
    assert model.config.layer == json.loads((place / "whole" / "search.json").read_text())["chosen"]
    card = json.loads((place / "whole" / "lgm" / "card.json").read_text())
    assert card["trained_on"]["videos"] == str(place / "videos") and card["trained_on"]["generated_share"] == 0
    assert str(place / "vggt") in card["geometry_licence"] and "CC BY-NC 4.0" in card["geometry_licence"]
    with torch.no_grad():
        out = model(torch.zeros(1, 3, 3, 4, 6))
    assert out.depth.shape == (1, 3, *SIZE)
    log = rows(place / "whole")
    assert [row["update"] for row in log] == list(range(6))
    assert {"depth", "translation", "rotation", "focal", "points", "conf", "flow", "loss"} <= log[0].keys()
    assert "heldout/abs_rel" in log[2] and "heldout/abs_rel" in log[5] and "heldout/abs_rel" not in log[0]
    card = json.loads((place / "whole" / "lgm" / "card.json").read_text())
    assert card["heldout_errors_against_teacher"]["abs_rel"] == pytest.approx(log[5]["heldout/abs_rel"])
    assert (place / "whole" / "search.html").stat().st_size > 1000


def test_training_goes_on_bit_for_bit(place, monkeypatch):
    step = lgm_training._Distillation.update

    def stop(self, number, watch):
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number, watch)

    monkeypatch.setattr(lgm_training._Distillation, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        train(place, "cut")
    monkeypatch.undo()
    torch.manual_seed(99)
    train(place, "cut")
    whole, cut = (load_file(place / name / "lgm" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert rows(place / "cut") == rows(place / "whole")
    assert any(k.startswith("lora.") and v.abs().sum() > 0 for k, v in whole.items() if "lora_B" in k)


def first_update(place, name, *overrides):
    """Gradients of a run's first update, and what it logs."""
    found = {}

    def stop(self, norm):
        found.update({key: p.grad.clone() for key, p in self.trained.items()})
        self.optimizer.zero_grad(set_to_none=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lgm_training._Distillation, "_step", stop)
        train(place, name, "updates=1", *overrides)
    return found, rows(place / name)[0]


@pytest.mark.parametrize(
    ("size", "dtype", "gradients", "rounding"),
    [(1, "double", 1e-9, 1e-9), (3, "double", 1e-9, 1e-9), (1, "float", 1e-3, 2e-6)],
)
def test_a_batch_in_parts_is_the_whole_batch(place, size, dtype, gradients, rounding, monkeypatch):
    """Losses and gradients, with a flow of which some pixels count as still; no call of the network sees more clips.

    In float32 the gradients agree less well than the losses: the L1 losses' slopes jump where an error is near zero.
    """
    monkeypatch.setattr(losses, "_STILL", 0.02)
    seen, predict, start, convert = [], LatentGeometryModel.predict, distill.distill, getattr(torch.Tensor, dtype)

    def watched(self, latents):
        seen.append(len(latents))
        return predict(self, latents)

    def started(config, model, *rest, **named):
        with monkeypatch.context() as patch:
            patch.setattr(LatentGeometryModel, "predict", watched)
            patch.setattr(torch.Tensor, "float", convert)
            return start(config, getattr(model, dtype)(), *rest, **named)

    monkeypatch.setattr(distill, "distill", started)
    whole, told = first_update(place, f"all-{size}-{dtype}")
    seen.clear()
    parts, said = first_update(place, f"parts-{size}-{dtype}", f"distill.micro_batch={size}")
    assert max(seen) == size
    scale = max(gradient.abs().max() for gradient in whole.values())
    assert max((whole[name] - parts[name]).abs().max() for name in whole) < gradients * scale
    assert said.keys() == told.keys()
    for name in ("loss", "depth", "flow", "points", "rotation", "conf", "heldout/abs_rel", "heldout/translation"):
        assert said[name] == pytest.approx(told[name], rel=0, abs=rounding), name


def test_a_run_may_change_how_it_uses_memory(place):
    """Recomputed activations give the same numbers, so a run that goes on with them is the uninterrupted one."""
    train(place, "again", "distill.gradient_checkpointing=true", "updates=6")
    one, two = (load_file(place / name / "lgm" / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    train(place, "again", "updates=7", "distill.micro_batch=2", "distill.gradient_checkpointing=false")
    assert len(rows(place / "again")) == 7


def test_what_made_the_cache_is_gone_when_training_starts(place, monkeypatch):
    makers, gone, start = [], [], distill.distill
    load = BlockVAE.__init__

    def remember(self):
        load(self)
        makers.append(weakref.ref(self))

    monkeypatch.setattr(BlockVAE, "__init__", remember)
    monkeypatch.setattr(
        distill, "distill", lambda *args, **named: gone.append(makers[0]() is None) or start(*args, **named)
    )
    train(place, "alone", "updates=1")
    assert gone == [True]


def test_out_of_memory_names_what_takes_less(place, monkeypatch):
    def full(self, number, watch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lgm_training._Distillation, "update", full)
    with pytest.raises(UserError, match=r"distill\.micro_batch: 1 and distill\.gradient_checkpointing: true"):
        train(place, "full")


def test_a_signal_saves_at_the_end_of_the_update(place, monkeypatch):
    step = lgm_training._Distillation.update

    def stop(self, number, watch):
        if number == 3:  # the last regular checkpoint is of update 3, this one is lost without it
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number, watch)

    monkeypatch.setattr(lgm_training._Distillation, "update", stop)
    with pytest.raises(KeyboardInterrupt, match="stopped after update 4 of 6; run again"):
        train(place, "stopped")
    assert load_latest(place / "stopped" / "checkpoints").step == 4
    monkeypatch.undo()
    train(place, "stopped")
    assert rows(place / "stopped") == rows(place / "whole")


def test_a_finished_run_does_nothing_and_another_config_is_refused(place):
    before = (place / "whole" / "lgm" / "model.safetensors").read_bytes()
    train(place, "whole")
    assert (place / "whole" / "lgm" / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match=r"distill.lora_rank: was 2, is 3.*output=DIR"):
        train(place, "whole", "distill.lora_rank=3")


def test_search_only_and_one_layer(place):
    path = train(place, "search", search_only=True)
    table = json.loads(path.read_text())
    assert table["ranked_by"] == "downstream" and {row["layer"] for row in table["layers"]} == {0, 1}
    scores = [row["downstream"] for row in table["layers"]]
    assert scores == sorted(scores) and table["chosen"] == table["layers"][0]["layer"]
    assert not (place / "search" / "lgm").exists()
    table = json.loads(train(place, "r2", "stitch.rank_by=r2", search_only=True).read_text())
    assert [row["r2"] for row in table["layers"]] == sorted((row["r2"] for row in table["layers"]), reverse=True)
    with pytest.raises(UserError, match="not safe for this model's heads"):
        train(place, "unsafe", "stitch.layers=[0, 3]")


def test_the_search_reads_a_bounded_number_of_clips(place, monkeypatch):
    read = []
    targets = CachedClips.targets

    def counted(self, index, *rest):
        read.append(len(index))
        return targets(self, index, *rest)

    monkeypatch.setattr(CachedClips, "targets", counted)
    # Every layer is compared with the teacher's geometry in the cache, which is not computed again.
    monkeypatch.setattr(VGGT, "forward", lambda *args: pytest.fail("the teacher's geometry is in the cache"))
    train(place, "bounded", "stitch.max_heldout=1", "clips.heldout_share=0.6", search_only=True)
    assert read == [1]


def test_an_earlier_search_is_used_only_where_it_is_the_same(place, monkeypatch):
    """The workflow of docs/train_lgm.md: search, look, then fix the layer in the same output."""
    searches = []
    search = distill.search_layers
    monkeypatch.setattr(distill, "search_layers", lambda *args: searches.append(args[4]) or search(*args))
    whole = place / "whole" / "stitch.safetensors"
    other = 1 - load_fit(whole).layer
    train(place, "fixed", search_only=True)
    train(place, "fixed", search_only=True)
    assert searches == [[0, 1]]  # the second time it is read
    fixed = ("stitch.layers=null", f"stitch.layer={other}", "updates=1")
    train(place, "fixed", *fixed)
    assert searches == [[0, 1], [other]]
    model = LatentGeometryModel.from_pretrained(place / "fixed" / "lgm")
    assert model.config.layer == other == json.loads((place / "fixed" / "search.json").read_text())["chosen"]
    # Once there is a checkpoint, a search that is not its own is refused.
    kept = place / "fixed" / "stitch.safetensors"
    save_fit(kept, replace(load_fit(kept), origin="of other clips"))
    with pytest.raises(UserError, match=r"other clips, weights or stitch\.\* than now; set another output=DIR"):
        train(place, "fixed", *fixed)
    # A file of before origins were recorded is searched again.
    (place / "old").mkdir()
    save_fit(place / "old" / "stitch.safetensors", replace(load_fit(whole), origin=""))
    train(place, "old", "stitch.rank_by=r2", search_only=True)
    assert searches[2:] == [[0, 1]] and load_fit(place / "old" / "stitch.safetensors").origin
    with pytest.raises(UserError, match="not safe for this model's heads"):
        train(place, "old", "stitch.layers=[0, 99]", search_only=True)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stitch.layers=[0, 99]"], r"stitch\.layers \[99\]: not safe for this model's heads; take from \[0, 1"),
        (["stitch.layers=null", "stitch.layer=99"], r"stitch\.layer \[99\]: not safe"),
        (["distill.batch=5"], "distill.batch 5 cannot be shared by 2 processes; make it a multiple of 2"),
        (["clips.generated_share=0.5", "clips.prompts=nowhere.txt"], "prompt file nowhere.txt does not exist"),
    ],
)
def test_what_later_stages_would_refuse_is_refused_before_the_cache_is_made(place, monkeypatch, overrides, words):
    monkeypatch.setattr(distill, "make_cache", lambda *args: pytest.fail("the cache takes hours"))
    monkeypatch.setattr(Processes, "join", lambda: Processes(0, 2))
    with pytest.raises(UserError, match=words):
        train(place, "refused", *overrides)


def test_cells_that_are_no_tokens_are_refused_before_the_cache_is_made(place, monkeypatch):
    monkeypatch.setattr(distill, "make_cache", lambda *args: pytest.fail("the cache takes hours"))
    monkeypatch.setattr(VGGT, "image_size_for", lambda self, size: (size[0], size[1] // 2))
    with pytest.raises(UserError, match=r"4x6 latent cells do not divide into the 12 tokens.*multiples of 16"):
        train(place, "refused")


def test_what_does_not_fit_is_refused_before_anything_is_written(place):
    for override, words in (
        ("clips.num_frames=8", "4n[+]1, got 8; the nearest is 9"),
        ("clips.height=30", "height must be a positive multiple of 8"),
    ):
        with pytest.raises(UserError, match=words):
            train(place, "new", "cache=" + str(place / "new-cache"), override)
        assert not (place / "new-cache").exists()
    with pytest.raises(UserError, match="another clip size"):
        train(place, "new", "clips.width=64")
    write_videos(place / "more", 6)  # files of the same names
    with pytest.raises(UserError, match=r"another clips\.videos"):
        train(place, "new", f"clips.videos={place / 'more'}")
    teacher(7).save_pretrained(place / "other")
    with pytest.raises(UserError, match="another teacher"):
        train(place, "new", f"geometry.path={place / 'other'}")


def keys_of(material):
    return [{material.clips.keys[i] for i in part} for part in (material.train, material.heldout)]


def test_a_shared_cache_gives_each_run_its_own_clips(place):
    """A run of fewer clips, or another seed, takes what a cache of its own would hold."""

    def material(name, *overrides):
        settings = config(place, name, "clips.generated_share=0.5", *overrides)
        vae, hashes = BlockVAE(), {"VAE": "1", "teacher": "2"}
        parts = distill._Parts(vae, vae.latent_spec, teacher(), Generator(), "vggt", torch.device("cpu"), hashes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distill, "_generated", generated)
            return keys_of(distill.make_cache(settings, parts, Processes()))

    def generated(config, model, prompt, number, name):
        noise = torch.Generator().manual_seed(1000 * config.seed + number)
        yield Clip(f"{name}#0", latents=torch.randn(3, 3, 4, 6, generator=noise), kind="generated")

    class Generator:
        """Nothing of it is asked."""

    shared = f"cache={place / 'shared'}"
    whole = material("a", shared)
    few = material("b", shared, "clips.max_clips=3")
    assert few == material("c", f"cache={place / 'own'}", "clips.max_clips=3") and len(set.union(*few)) == 6
    other = material("d", shared, "seed=5")
    for keys, seed in ((whole, 0), (few, 0), (other, 5)):
        made = {key for key in set.union(*keys) if key.startswith("generated/")}
        assert 2 * len(made) == len(set.union(*keys)) and all(key.startswith(f"generated/{seed}/") for key in made)
    assert material("e", shared) == whole
    with pytest.raises(UserError, match=r"another clips\.clips_per_video"):
        material("f", shared, "clips.clips_per_video=3")


def test_frame_rate_and_a_square_clip_train_too(place):
    cache = str(place / "frame-cache")
    train(
        place, "frame", f"cache={cache}", "stitch.view_rate=frame", "clips.width=32", "updates=1", "stitch.layers=[0]"
    )
    model = LatentGeometryModel.from_pretrained(place / "frame" / "lgm")
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 2, 4, 4)).depth.shape == (1, 5, 32, 32)


def test_diverging_runs_stop(place):
    with pytest.raises(UserError, match="no finite gradient"):
        train(place, "diverges", "distill.learning_rate=1e30", "updates=40", "distill.warmup_updates=0")
    shutil.rmtree(place / "diverges")


def test_a_damaged_fit_is_searched_again(tmp_path):
    fit = StitchFit(3, torch.randn(4, 2, 5, 5, 5), torch.randn(4), torch.randn(2, 1, 4), 0.25)
    save_fit(tmp_path / "f.safetensors", fit)
    got = load_fit(tmp_path / "f.safetensors")
    assert (got.layer, got.r2) == (3, 0.25) and torch.equal(got.weight, fit.weight)
    save_file({"weight": fit.weight}, tmp_path / "f.safetensors")
    with pytest.raises(UserError, match="search is run again"):
        load_fit(tmp_path / "f.safetensors")


def test_every_clip_is_seen_once_an_epoch():
    among = list(range(100, 110))
    seen = [clip for update in range(5) for clip in draw_batch(1, update, among, 4)]
    assert sorted(seen[:10]) == among and sorted(seen[10:]) == among and seen[:10] != seen[10:]
    assert draw_batch(1, 2, among, 4) == seen[8:12] != draw_batch(2, 2, among, 4)


def test_schedule():
    rates = [warmup_cosine(i, peak=1.0, total=110, warmup=10) for i in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == 1.0 and rates[110] == pytest.approx(0.02)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def prediction(depth, scale=1.0, conf=None):
    poses = torch.eye(4).repeat(1, 2, 1, 1)
    poses[:, 1, 0, 3] = 0.1 * scale
    k = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 2, 3, 3)
    return GeometryPrediction.from_depth(poses, k, depth * scale, conf)


def test_the_teachers_unit_does_not_matter_and_its_holes_are_no_target():
    depth = 1 + torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    exact, _ = distillation_loss(prediction(depth), {}, prediction(depth))
    assert exact.item() < 1e-5
    near, parts = distillation_loss(prediction(1.1 * depth), {}, prediction(depth))
    far, _ = distillation_loss(prediction(1.1 * depth, 7.0), {}, prediction(depth, 7.0))
    assert near.item() > 0.1 and near.item() == pytest.approx(far.item(), rel=1e-4)
    assert parts["depth"] == pytest.approx(0.0953, abs=1e-3) and parts["translation"] == pytest.approx(0, abs=1e-6)
    conf = torch.ones_like(depth)
    conf[:, :, :4] = 0
    wrong = depth.clone()
    wrong[:, :, :4] *= 3
    _, masked = distillation_loss(prediction(wrong), {}, prediction(depth, conf=conf))
    assert masked["depth"] == 0 and masked["conf"] == pytest.approx(0.5)
    free = prediction(wrong.requires_grad_())
    loss, _ = distillation_loss(free, {}, prediction(depth, conf=conf))
    loss.backward()
    assert (wrong.grad[:, :, :4] == 0).all()
