"""SFT, DPO, direct training and NFT on a random tiny pipeline: golden losses, what each prepares, and what it makes of
clips that say nothing.

`python tests/unit/test_posttraining_rivals.py` writes the golden numbers anew.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from fake_lgm import fake_lgm
from safetensors.torch import load_file
from tiny_wan import save_tiny_wan

from vggrpo.config import load_config
from vggrpo.errors import UserError
from vggrpo.io.manifest import ManifestRow, write_manifest
from vggrpo.io.video import write_video
from vggrpo.models.wan import WanVideoModel
from vggrpo.posttraining import direct as direct_module
from vggrpo.posttraining import pairs as pairs_module
from vggrpo.posttraining import train
from vggrpo.posttraining.clips import clip_settings
from vggrpo.posttraining.pairs import choose_pairs
from vggrpo.posttraining.rgb_reader import RGBGeometry
from vggrpo.rewards import camera_motion_smoothness, get_reward

GOLDEN = Path(__file__).parents[1] / "golden" / "rival_losses.json"
ALGORITHMS = ("sft", "dpo", "direct", "nft")
PROMPTS = ["a red box", "the sphere rolls", "blue box"]


def config_for(algorithm, pipeline, output, overrides=()):
    values = {
        "algorithm": algorithm,
        "output": str(output),
        "updates": 2,
        "save_every": 1,
        "model": {"path": str(pipeline)},
        "data": {"num_frames": 13, "height": 32, "width": 32},
        "sampling": {"num_steps": 3, "window": 1},
        "rewards": {"camera_motion_smoothness": 1, "geometry_reprojection_consistency": 1, "camera_motion_hinge": 0.5},
        "grpo": {"base_travel_samples": 1},
        "sft": {"candidates": 3, "keep": 0.5, "batch": 4, "micro_batch": 3},
        "dpo": {"pairs": "latent", "candidates": 3, "min_gap": 0, "batch": 3, "micro_batch": 2, "beta": 20},
        "direct": {"prompts_per_update": 2, "grad_steps": 2, "micro_batch": 3},
        "nft": {"prompts_per_update": 2, "samples_per_prompt": 3, "inner_updates": 2, "times": 2, "micro_batch": 5},
        "lora": {"rank": 2},
        "optim": {"learning_rate": 1e-3},
    }
    return load_config(values, overrides)


def run(algorithm, pipeline, output, *overrides, lgm=fake_lgm):
    return train(config_for(algorithm, pipeline, output, overrides), lgm=lgm, prompts=PROMPTS, progress=False)


def rows(output):
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in lines]


def adapter(output):
    return load_file(Path(output) / "lora" / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def done(tiny_wan_dir, tmp_path_factory):
    """Two updates of each algorithm."""
    folder = tmp_path_factory.mktemp("rivals")
    for algorithm in ALGORITHMS:
        run(algorithm, tiny_wan_dir, folder / algorithm)
    return folder


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_golden_losses_and_what_a_run_leaves(done, algorithm):
    log = rows(done / algorithm)
    golden = json.loads(GOLDEN.read_text())[algorithm]
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in golden], rel=0.02)
    assert [row["grad_norm"] for row in log] == pytest.approx([row["grad_norm"] for row in golden], rel=0.05)
    # Budgets are logged by videos and by seconds.
    videos = {"sft": [9, 0], "dpo": [9, 0], "direct": [4, 4], "nft": [6, 6]}[algorithm]
    assert [row["videos"] for row in log] == videos
    assert all(
        "seconds/total" in json.loads(line) for line in (done / algorithm / "log.jsonl").read_text().splitlines()
    )
    assert any(value.any() for key, value in adapter(done / algorithm).items() if "lora_B" in key)
    assert f": {algorithm}, 2 of 2 updates" in (done / algorithm / "lora" / "README.md").read_text()


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_a_signal_while_clips_are_made_stops_after_a_prompt_and_loses_nothing(tiny_wan_dir, done, tmp_path, algorithm):
    def terminated(latents):
        signal.raise_signal(signal.SIGTERM)
        return fake_lgm(latents)

    a_prompt_at_a_time = "sampling.micro_batch=3"
    with pytest.raises(KeyboardInterrupt, match="run again to go on"):
        run(algorithm, tiny_wan_dir, tmp_path, a_prompt_at_a_time, lgm=terminated)
    (made,) = (tmp_path / "clips").glob("prompt-*.json")
    when = made.stat().st_mtime_ns
    run(algorithm, tiny_wan_dir, tmp_path, a_prompt_at_a_time)
    assert made.stat().st_mtime_ns == when and len(list((tmp_path / "clips").glob("prompt-*.json"))) == 3
    losses, uninterrupted = ([row["loss"] for row in rows(path)] for path in (tmp_path, done / algorithm))
    assert losses == pytest.approx(uninterrupted, rel=1e-3)


@pytest.mark.parametrize(
    ("algorithm", "override", "said"),
    [
        ("sft", "sft.candidates=2", r"sft\.candidates: was 3, is 2"),
        ("sft", "rewards.camera_motion_hinge.weight=0.25", r"rewards\.camera_motion_hinge\.weight: was 0\.5, is 0\.25"),
        ("dpo", "dpo.pairs=epipolar", r"dpo\.\w+: was .*, is "),
        ("dpo", None, r"prompts: was '\w+', is '\w+'"),
    ],
)
def test_clips_of_other_settings_are_refused(tiny_wan_dir, tmp_path, algorithm, override, said):
    """A preparation that was interrupted leaves clips and no checkpoint that would tell."""

    def terminated(latents):
        signal.raise_signal(signal.SIGTERM)
        return fake_lgm(latents)

    a_prompt_at_a_time = "sampling.micro_batch=3"
    with pytest.raises(KeyboardInterrupt):
        run(algorithm, tiny_wan_dir, tmp_path, a_prompt_at_a_time, lgm=terminated)
    config = config_for(algorithm, tiny_wan_dir, tmp_path, [] if override is None else [override])
    prompts = PROMPTS if override is not None else [*PROMPTS, "one more"]
    with pytest.raises(UserError, match=said) as caught:
        train(config, lgm=fake_lgm, prompts=prompts, progress=False)
    assert "output=DIR" in str(caught.value) and "\n" not in str(caught.value)
    settings = tmp_path / "clips" / "settings.json"
    for spoil, reason in ((lambda: settings.write_text("{"), "damaged"), (settings.unlink, "no settings.json")):
        spoil()
        with pytest.raises(UserError, match=f"{reason}.* delete .*clips"):
            run(algorithm, tiny_wan_dir, tmp_path)
    for file in (tmp_path / "clips").glob("prompt-*.json"):
        file.unlink()
    train(config_for(algorithm, tiny_wan_dir, tmp_path, ["updates=1"]), lgm=fake_lgm, prompts=prompts, progress=False)
    assert json.loads(settings.read_text())["algorithm"] == algorithm  # where no prompt is done, any settings will do


def test_what_clips_follow_from(tiny_wan_dir, tmp_path):
    def settings(algorithm, *overrides):
        return clip_settings(config_for(algorithm, tiny_wan_dir, tmp_path, overrides), PROMPTS)

    for algorithm in ("sft", "dpo"):
        plain = settings(algorithm)
        for same in (
            "updates=9",
            "sampling.micro_batch=1",
            "optim.learning_rate=1",
            "grpo.kl=1",
            f"{algorithm}.batch=7",
        ):
            assert settings(algorithm, same) == plain
        for other in ("seed=1", "sampling.num_steps=4", "data.height=16", f"{algorithm}.candidates=2",
                      "rewards.camera_motion_smoothness.options.eps_rotation=0.1"):  # fmt: skip
            assert settings(algorithm, other) != plain
    # The matches of frames do not ask the rewards.
    by_frames = settings("dpo", "dpo.pairs=epipolar")
    assert settings("dpo", "dpo.pairs=epipolar", "rewards={camera_motion_smoothness: 1}") == by_frames
    assert settings("dpo", "dpo.pairs=epipolar", "dpo.fps=4") != by_frames


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_change_nothing_but_rounding(tiny_wan_dir, done, tmp_path, algorithm):
    run(algorithm, tiny_wan_dir, tmp_path, f"{algorithm}.micro_batch=1", "updates=1")
    assert rows(tmp_path)[0]["loss"] == pytest.approx(rows(done / algorithm)[0]["loss"], rel=1e-4)
    assert rows(tmp_path)[0]["grad_norm"] == pytest.approx(rows(done / algorithm)[0]["grad_norm"], rel=1e-3)


def test_sft_keeps_the_best_of_each_prompts_candidates(done):
    notes = [json.loads(file.read_text()) for file in sorted((done / "sft" / "clips").glob("prompt-*.json"))]
    assert [note["prompt"] for note in notes] == PROMPTS
    for note in notes:
        assert len(note["files"]) == 2 and all(len(values) == 3 for values in note["rewards"].values())
        kept = sorted(int(name.split("-")[2][:3]) for name in note["files"])
        normalised = torch.zeros(3)
        for name, values in note["rewards"].items():
            v = torch.tensor(values)
            if v.std(correction=0) > 0:
                weight = 0.5 if "hinge" in name else 1.0
                normalised += weight * (v - v.mean()) / (v.std(correction=0) + 1e-4)
        assert kept == sorted(normalised.argsort(descending=True)[:2].tolist())


@pytest.mark.parametrize("kind", ["epipolar", "geometry"])
def test_pairs_from_frames(tiny_wan_dir, tmp_path, kind, monkeypatch):
    def by_brightness(clip, metrics):
        value = float(clip.frames.mean())
        return {"epipolar_error": _measured(value), "motion_flow": _measured(1.0)}

    monkeypatch.setattr(pairs_module, "evaluate_clip", by_brightness)
    monkeypatch.setattr(pairs_module, "load_rgb_reader", lambda settings, model: fake_lgm)
    run("dpo", tiny_wan_dir, tmp_path, f"dpo.pairs={kind}", "updates=1", "dpo.min_motion=0")
    notes = [json.loads(file.read_text()) for file in sorted((tmp_path / "clips").glob("prompt-*.json"))]
    model = WanVideoModel.from_pretrained(tiny_wan_dir)
    for note in notes:
        (pair,) = note["pairs"]
        assert pair["winner"] == min(range(3), key=note["errors"].__getitem__)
        assert pair["loser"] == max(range(3), key=note["errors"].__getitem__)
        if kind == "epipolar":
            stored = load_file(tmp_path / "clips" / pair["file"])
            frames = {name: model.decode(latent[None]).mean() for name, latent in stored.items()}
            assert frames["winner"] < frames["loser"]


def _measured(value):
    from vggrpo.evaluation.metrics import Measurement

    return Measurement.of(value)


@pytest.mark.parametrize(
    ("errors", "motion", "options", "expected"),
    [
        ([3.0, 1.0, 2.0], [1, 1, 1], {}, [(1, 0)]),
        ([3.0, 1.0, 2.0], [1, 0.1, 1], {}, [(2, 0)]),  # the still clip does not win
        ([3.0, float("nan"), 2.0], [1, 1, 1], {}, [(2, 0)]),
        ([3.0, 1.0, 2.0, 4.0, 2.5], [1] * 5, {"count": 2}, [(1, 3), (2, 0)]),
        ([3.0, 1.0, 2.0], [1, 1, 1], {"count": 9}, [(1, 0)]),  # nothing is paired with itself, or twice
        ([2.05, 1.0, 2.0, 4.0], [1] * 4, {"count": 2}, [(1, 3)]),  # the second pair is too close
        ([3.0, 2.9, float("nan")], [1, 1, 1], {}, "differ"),
        ([3.0, float("nan"), float("nan")], [1, 1, 1], {}, "1 of 3 candidates could be measured"),
        ([3.0, 1.0, 2.0], [10, 1, 1], {"min_motion": 2}, "move enough"),
        ([1.0, 1.0], [1, 1], {"min_gap": 0.0}, "differ"),
        ([0.5, -0.5], [1, 1], {"relative": False, "min_gap": 0.9}, [(1, 0)]),
    ],
)
def test_choice_of_pairs(errors, motion, options, expected):
    found = choose_pairs(torch.tensor(errors), torch.tensor(motion, dtype=torch.float32),
                        **{"min_gap": 0.1, "min_motion": 0.5} | options)  # fmt: skip
    assert (expected in found) if isinstance(expected, str) else found == expected


def test_without_a_single_pair_the_run_says_why(tiny_wan_dir, tmp_path):
    with pytest.raises(UserError, match=r"none of 3 prompts gives a pair.*differ"):
        run("dpo", tiny_wan_dir, tmp_path, "dpo.min_gap=0.999", "dpo.pairs=latent", lgm=_still)


def _still(latents):
    return fake_lgm(torch.zeros_like(latents))


def test_nft_with_an_averaged_old_policy_and_invalid_samples(tiny_wan_dir, tmp_path):
    def broken(latents):
        prediction = fake_lgm(latents)
        prediction.depth[0] = torch.nan
        return prediction

    run("nft", tiny_wan_dir, tmp_path, "nft.old=average", "optim.ema=0.5", "rewards={camera_motion_smoothness: 1}",
        lgm=broken)  # fmt: skip
    log = rows(tmp_path)
    assert log[0]["samples/invalid"] == 1 and log[0]["grad_norm"] > 0
    with pytest.raises(UserError, match=r"optim\.ema"):
        config_for("nft", tiny_wan_dir, tmp_path, ["nft.old=average"])


@pytest.mark.parametrize("algorithm", ["direct", "nft"])
def test_nothing_valid_changes_nothing(tiny_wan_dir, tmp_path, algorithm):
    def nothing(latents):
        prediction = fake_lgm(latents)
        prediction.depth[:] = torch.nan
        return prediction

    run(algorithm, tiny_wan_dir, tmp_path, "updates=1", "direct.kl=0", "grpo.base_travel_samples=1", lgm=nothing)
    assert not any(value.any() for key, value in adapter(tmp_path).items() if "lora_B" in key)
    assert rows(tmp_path)[0]["samples/invalid"] in (4, 6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_reward_that_does_not_apply_to_the_prompts_does_not_switch_learning_off(tiny_wan_dir, tmp_path, algorithm):
    """No prompt names a camera move: adherence is invalid for every clip, and smoothness must teach all the same."""
    run(algorithm, tiny_wan_dir, tmp_path, "updates=1", "rewards={camera_motion_smoothness: 1, camera_adherence: 1}")
    (row,) = rows(tmp_path)
    assert row["loss"] == row["loss"] and row["grad_norm"] > 0
    assert any(value.any() for key, value in adapter(tmp_path).items() if "lora_B" in key)
    if algorithm == "direct":
        assert row["samples/invalid"] == 0 and 0 < row["reward/camera_motion_smoothness"] <= 1


@pytest.mark.parametrize(("mode", "matters"), [("decoupled", False), ("sum", True)])
def test_the_unit_of_a_reward_does_not_matter_to_direct_training(tiny_wan_dir, tmp_path, monkeypatch, mode, matters):
    def in_hundredths(name):
        def reward(*args, **options):
            found = get_reward(name)(*args, **options)
            return replace(found, value=100 * found.value) if name == "camera_motion_smoothness" else found

        return reward

    overrides = [f"grpo.mode={mode}", "grpo.eps=1e-12", "direct.kl=0", "updates=1"]
    run("direct", tiny_wan_dir, tmp_path / "one", *overrides)
    monkeypatch.setattr(direct_module, "get_reward", in_hundredths)
    run("direct", tiny_wan_dir, tmp_path / "other", *overrides)
    norms = [rows(tmp_path / name)[0]["grad_norm"] for name in ("one", "other")]
    assert (norms[1] == pytest.approx(norms[0], rel=1e-3)) is not matters


def test_videos_whose_prompts_name_no_camera_move_are_kept_beside_those_that_do(tiny_wan_dir, tmp_path):
    prompts = ["a red box", "pan left", "zoom in"]
    for number in range(3):
        video = torch.rand(3, 13, 32, 32, generator=torch.Generator().manual_seed(number))
        write_video(tmp_path / f"{number}.mp4", video, 8)
    write_manifest(tmp_path / "manifest.jsonl",
                   [ManifestRow(f"{n}.mp4", prompt, 0, 8.0, "real") for n, prompt in enumerate(prompts)])  # fmt: skip
    config = config_for("sft", tiny_wan_dir, tmp_path / "out", [
        f"sft.videos={tmp_path}", "sft.keep=1", "updates=1",
        "rewards={camera_motion_smoothness: 1, camera_adherence: 1}"])  # fmt: skip
    train(config, lgm=fake_lgm, progress=False)
    assert rows(tmp_path / "out")[0]["clips"] == 3


def test_rgb_rewards_read_the_decoded_frames(tiny_wan_dir, tmp_path, monkeypatch):
    """`reward.space: rgb` is a field: the same GRPO, another reader."""
    from test_lgm import tiny_vggt

    geometry = tiny_vggt()
    model = WanVideoModel.from_pretrained(tiny_wan_dir)
    reader = RGBGeometry(model, geometry)
    latents = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    prediction = reader(latents)
    with torch.no_grad():
        frames = model.decode(latents)[:, :, ::4].transpose(1, 2)
        size = geometry.image_size_for((32, 32))
        if size == (32, 32):
            torch.testing.assert_close(prediction.depth, geometry(frames).depth)
    assert prediction.frame_index.tolist() == [0, 4, 8, 12]
    (gradient,) = torch.autograd.grad(camera_motion_smoothness(prediction).value.sum(), latents)
    assert gradient.isfinite().all() and gradient.any()
    geometry.save_pretrained(tmp_path / "geometry")
    config = config_for("grpo", tiny_wan_dir, tmp_path / "out", [
        "reward.space=rgb", f"reward.geometry={tmp_path / 'geometry'}", "grpo.prompts_per_update=1", "updates=1",
        "grpo.samples_per_prompt=3"])  # fmt: skip
    train(config, prompts=PROMPTS, progress=False)
    assert rows(tmp_path / "out")[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["direct.grad_steps=9"], r"direct\.grad_steps 9"),
        (["model.shard=true"], r"model\.shard"),
        (["algorithm=sft", "sft.videos=x", "data.first_frames=x.txt"], r"sft\.videos are not made from"),
    ],
)
def test_what_does_not_go_together(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        config_for("direct", "embedded", tmp_path, override)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        pipeline = save_tiny_wan(Path(folder) / "wan")
        golden = {}
        for algorithm in ALGORITHMS:
            run(algorithm, pipeline, Path(folder) / algorithm)
            golden[algorithm] = [
                {key: row[key] for key in ("loss", "grad_norm")} for row in rows(Path(folder) / algorithm)
            ]
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
