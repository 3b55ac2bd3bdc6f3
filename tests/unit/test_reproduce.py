"""Recipes of the paper's tables: every arm is a valid config of equal budget, and results say what they are."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from vggrpo import reproduce as package
from vggrpo.commands.reproduce import NAMES
from vggrpo.config_algorithms import StopConfig
from vggrpo.errors import UserError
from vggrpo.evaluation.benchmarks import load_prompt_sets
from vggrpo.reproduce import STUDIES, TABLES, Settings, reproduce, stitching
from vggrpo.reproduce import digests as digests_module
from vggrpo.reproduce.curves import HEIGHT, WIDTH, bars, noise_panels
from vggrpo.reproduce.digests import digests, weights_digest
from vggrpo.reproduce.recipes import FAR
from vggrpo.reproduce.results import difference_cell, write_results
from vggrpo.reproduce.settings import arm_config, check_settings

ARMS = {arm.name: arm for table in TABLES.values() for arm in table.arms}


def test_the_command_knows_every_recipe():
    assert set(NAMES) == {*TABLES, *STUDIES}
    assert package.reproduce is reproduce


def test_one_name_is_one_run():
    for table in TABLES.values():
        for arm in table.arms:
            assert arm == ARMS[arm.name]
            assert not arm.lora_of or ARMS[arm.lora_of].train is not None
    for table in TABLES.values():
        assert all(load_prompt_sets([name], 2) for name in table.sets)


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.train is not None])
@pytest.mark.parametrize("config", ["tiny", "wan2.1-t2v-1.3b"])
def test_every_arm_is_a_valid_config_of_the_same_budget(name, config, tmp_path):
    arm = ARMS[name]
    reference = arm_config(ARMS["vggrpo"], Settings(config=config), tmp_path, 1)
    found = arm_config(arm, Settings(config=config), tmp_path, 1)
    assert found.stop == StopConfig()  # a stop rule would make budgets unequal
    assert found.seed == 1 and found.output == str(tmp_path / "runs" / f"{name}-s1")
    assert videos_of(found) == pytest.approx(videos_of(reference), rel=0.05)
    if found.algorithm in ("grpo", "nft"):
        assert samples_of(found) == pytest.approx(samples_of(reference), rel=0.05)
    elif found.algorithm != "direct":  # one pass over the clips
        assert 16 <= samples_of(found) <= samples_of(reference)
    quick = arm_config(arm, Settings(config=config).smallest(), tmp_path, 0)
    assert quick.updates == 1 and quick.sampling.num_steps == 3 and quick.grpo.samples_per_prompt <= 4
    assert config != "tiny" or videos_of(quick) <= 4


@pytest.mark.parametrize("arm", [ARMS["no-hinge"], ARMS["no-presence"], FAR[1]])
def test_an_arm_without_a_hinge_keeps_the_other_rewards_as_they_are(arm, tmp_path):
    ours = arm_config(ARMS["vggrpo"], Settings(), tmp_path, 0)
    found = arm_config(arm, Settings(), tmp_path, 0)
    assert found.rewards == {name: term for name, term in ours.rewards.items() if name not in arm.without}
    assert len(found.rewards) == len(ours.rewards) - len(arm.without) and any(
        term.options for term in found.rewards.values()
    )
    edited = Settings(overrides=("rewards.camera_motion_smoothness.options.eps_rotation=0.07",))
    assert arm_config(arm, edited, tmp_path, 0).rewards["camera_motion_smoothness"].options["eps_rotation"] == 0.07


def test_the_papers_rewards_have_no_options(tmp_path):
    found = arm_config(ARMS["paper-rewards"], Settings(), tmp_path, 0).rewards
    assert set(found) == {"camera_motion_smoothness", "geometry_reprojection_consistency"}
    assert all(term.weight == 1 and not term.options for term in found.values())


def videos_of(config):
    """Videos that a training makes."""
    pairs = {
        "grpo": (config.updates, config.grpo.prompts_per_update * config.grpo.samples_per_prompt),
        "nft": (config.updates, config.nft.prompts_per_update * config.nft.samples_per_prompt),
        "direct": (config.updates, config.direct.prompts_per_update * config.direct.samples_per_prompt),
        "sft": (config.data.num_prompts, config.sft.candidates),
        "dpo": (config.data.num_prompts, config.dpo.candidates),
    }
    first, second = pairs[config.algorithm]
    return first * second


def samples_of(config):
    """Clips at a noise level that carry gradient."""
    per_update = {
        "grpo": videos_of(config) // config.updates * config.sampling.window,
        "nft": videos_of(config) // config.updates * config.nft.times,
        "sft": config.sft.batch,
        "dpo": 2 * config.dpo.batch,
    }
    return config.updates * per_update[config.algorithm]


def entry(mean, half, higher=True):
    return {"base": 1.0, "tuned": 1 + mean, "diff": mean, "ci_low": None if half is None else mean - half,
            "ci_high": None if half is None else mean + half, "higher_is_better": higher, "n": 40}  # fmt: skip


def results(quick=False):
    row = {
        "metrics": {"epipolar_inliers": entry(0.1, 0.05), "judge_reprojection": entry(0.1, 0.05, higher=False),
                    "motion_flow": entry(0.0, None)},
        "motion_ratio": 1.02, "training_seeds": 3, "counts": False, "checks": {},
    }  # fmt: skip
    cost = {"seconds_per_video": 0.25, "network_passes_per_video": 40, "network_gradients_per_video": 4,
            "reward_gradients_per_video": 2, "device": "cpu"}  # fmt: skip
    about = {"about": "a rival", "training_videos": 32.0, "training_seconds": 8.5, "training_updates": 4.0,
             "sampling": cost}  # fmt: skip
    settings = {"quick": quick, "config": "tiny", "seeds": 3, "prompts": 40, "videos": 2, "steps": 20,
                "guidance_scale": 1.0}  # fmt: skip
    where = {"gpu": None, "platform": "Test", "processors": 2, "torch": "2", "vggrpo": "0"}
    return {"table": "main", "title": "T", "claim": "C", "settings": settings, "machine": where,
            "arms": {"rival": about}, "sets": {"world-static": {"rival": row}}}  # fmt: skip


def test_results_carry_intervals_budgets_and_the_machine(tmp_path):
    path = write_results(tmp_path, "main", results())
    text = path.read_text()
    assert "+0.1 [+0.05, +0.15] ▲" in text and "+0.1 [+0.05, +0.15] ▼" in text  # one is better high, one low
    assert "| rival | a rival | 32 | 4 | 8.5 | 0.25 | 40 | 4 network + 2 LGM |" in text
    assert "Made on Test, 2 processors" in text
    assert "quick run" not in text and "quick run" in write_results(tmp_path, "q", results(quick=True)).read_text()
    assert json.loads((tmp_path / "main.json").read_text())["sets"]["world-static"]["rival"]["motion_ratio"] == 1.02
    picture = cv2.imread(str(tmp_path / "main.png"))
    assert picture is not None
    greenish = (picture[..., 1].astype(int) - picture[..., 2] > 60).sum()
    reddish = (picture[..., 2].astype(int) - picture[..., 1] > 60).sum()
    assert greenish > 50 and reddish > 50


def test_the_page_has_every_training_seed_win_rates_failures_and_matched_pairs(tmp_path):
    result = results()
    metrics = result["sets"]["world-static"]["rival"]["metrics"]
    metrics["epipolar_inliers"] |= {
        "by_training_seed": [0.2, -0.1, None], "win_rate": 0.625, "failures_base": 3, "failures_tuned": 5,
        "motion_matched": {"diff": 0.08, "ci_low": 0.02, "ci_high": 0.14, "n": 38},
    }  # fmt: skip
    metrics["kernel_distance"] = entry(0.1, 0.05, higher=False) | {"by_training_seed": [0.1, 0.05, 0.02]}
    text = write_results(tmp_path, "main", result).read_text()
    assert "| rival | epipolar_inliers | +0.2, -0.1, - | 62% | 3 / 5 | +0.08 [+0.02, +0.14], n=38 |" in text
    assert "| rival | judge_reprojection | - | - | - | - |" in text  # a result of an older version lacks them
    assert "| rival | kernel_distance | +0.1, +0.05, +0.02 | - | - | - |" in text
    assert "kernel_distance is that of the training seed whose interval reaches furthest" in text


@pytest.mark.parametrize(
    ("name", "p_holm", "half", "mark"),
    [
        ("epipolar_inliers", 0.2, 0.05, " ▲"),  # fixed beforehand: by its interval
        ("epipolar_inliers", 0.01, 0.2, ""),
        ("flow_cycle", 0.01, 0.05, " ▼"),
        ("flow_cycle", 0.2, 0.05, ""),  # one of many: the interval alone leaves out zero too easily
        ("motion_reward", None, 0.05, ""),
        ("kernel_distance", None, 0.05, ""),
    ],
)
def test_marks_are_by_the_adjusted_p_but_for_the_headline(name, p_holm, half, mark):
    found = entry(0.1, half, higher=name != "flow_cycle") | {"p_holm": p_holm}
    assert difference_cell(name, found) == f"+0.1 [{0.1 - half:+.3g}, {0.1 + half:+.3g}]{mark}"


def test_results_say_how_far_vggrpo_is_ahead(tmp_path):
    against = {"rival": {"epipolar_inliers": entry(0.2, 0.05), "judge_reprojection": entry(0.1, 0.2, higher=False)}}
    text = write_results(tmp_path, "main", results() | {"against": against}).read_text()
    section = text.split("## VGGRPO against each arm")[1].split("##")[0]
    assert "| arm | epipolar_inliers | judge_reprojection |" in section
    assert "| rival | +0.2 [+0.15, +0.25] ▲ | +0.1 [-0.1, +0.3] |" in section


def test_studies_become_tables(tmp_path):
    found = {
        "reference": "the truth",
        "noise": {"levels": [0.0, 0.5], "lgm": {"rotation": [0.1, 0.2]}, "decode_then_rgb": {"rotation": [0.05, 0.4]},
                  "lgm_better_from": {"rotation": 0.5}},
        "cost": {"17x64x64": {"rgb": {"flops": 4e12, "flops_of_rgb": 1.0, "seconds": 2.0, "time_of_rgb": 1.0},
                              "latent": {"flops": 1e12, "flops_of_rgb": 0.25}}},
    }  # fmt: skip
    result = {key: value for key, value in results().items() if key not in ("sets", "arms", "claim")} | {"found": found}
    text = write_results(tmp_path, "robustness", result).read_text()
    assert "| 0.5 | 0.2 / 0.4 |" in text and "| LGM better from | 0.5 |" in text
    assert "| latent | 1 | 0.25 | - | - | - |" in text and "Made on Test" in text
    assert "![robustness](robustness.png)" in text
    picture = cv2.imread(str(tmp_path / "robustness.png"))
    assert picture.shape == (2 * HEIGHT, 2 * WIDTH, 3)  # one panel of noise, filled up; operations and seconds
    assert colours_in(picture[:HEIGHT, :WIDTH]) and (picture[:HEIGHT, WIDTH:] == 255).all()
    assert colours_in(picture[HEIGHT:, :WIDTH]) and colours_in(picture[HEIGHT:, WIDTH:])
    assert {file.name for file in tmp_path.iterdir()} == {f"robustness.{kind}" for kind in ("json", "md", "png")}


def colours_in(picture):
    """Whether anything but grey and black is drawn."""
    return bool((picture.max(2).astype(int) - picture.min(2) > 60).any())


def test_noise_has_a_panel_for_each_error_and_both_ways():
    noise = {"levels": [0.0, 0.4, 0.8], "lgm": {"rotation": [0.1, 0.2, 0.3], "flow": [0.1, None, 0.1]},
             "decode_then_rgb": {"rotation": [0.3, 0.2, 0.1], "flow": [0.15, 0.2, 0.15]},
             "lgm_better_from": {"rotation": None, "flow": 0.0}}  # fmt: skip
    panels = noise_panels(noise)
    assert len(panels) == 2
    for drawn in panels:
        blue, red = (
            (drawn[..., c].astype(int) - drawn[..., 2 - c] > 80)[40 : HEIGHT - 30].any() for c in (0, 2)
        )  # below the names
        assert blue and red


def test_bars_are_as_long_as_their_values():
    drawn = bars("seconds", {"rgb": 4.0, "lgm": 1.0, "frame": None}, 2.0)
    coloured = drawn.max(2).astype(int) - drawn.min(2) > 60
    lengths = [int(part.sum(1).max()) for part in np.array_split(coloured[30:], 3)]
    assert lengths[0] == pytest.approx(4 * lengths[1], abs=4) and lengths[2] == 0


def test_the_study_of_stitching_has_a_picture(tmp_path, monkeypatch):
    accuracy = {"lgm": {"abs_rel": 0.1}, "ratio": {"abs_rel": 1.5}}
    row = {"about": "x", "layer": 0, "view_rate": "latent", "accuracy": accuracy,
           "training": {"updates": 1, "clips": 2}}  # fmt: skip
    monkeypatch.setattr(stitching, "_row", lambda *_: row)
    common = {key: value for key, value in results().items() if key in ("title", "settings", "machine")}
    path = stitching.study_stitching(tmp_path, Settings(), common, lambda _: None)
    assert "![stitch](stitch.png)" in path.read_text()
    picture = cv2.imread(str(tmp_path / "stitch.png"))
    assert picture.shape[1] == len(stitching.ERRORS) * WIDTH and colours_in(picture[:, :WIDTH])


def test_few_prompts_earn_no_mark(tmp_path):
    result = results()
    result["sets"]["world-static"]["rival"]["checks"] = {"sample": {"outcome": False}, "motion": {"outcome": True}}
    result["made_of"] = {"recipe tiny": "0123abc"}
    text = write_results(tmp_path, "main", result).read_text()
    assert "| too few prompts |" in text and "of (SHA-256): recipe tiny 0123abc." in text
    for value in result["sets"]["world-static"]["rival"]["metrics"].values():
        value["n"] = 3
    assert "] ▲" not in write_results(tmp_path, "main", result).read_text()


def test_bad_requests_are_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="no table 'mian'"):
        reproduce(["mian"], tmp_path)
    with pytest.raises(UserError, match="no arm 'sftt' in main; there are sft"):
        reproduce(["main"], tmp_path, arms=["sftt"])
    for wrong in ({"overrides": ("foo",)}, {"sets": ("statik",)}, {"device": "fpga"}, {"config": "none"}):
        with pytest.raises(UserError):
            reproduce(["main"], tmp_path, Settings(**wrong))
    assert not list(tmp_path.iterdir())
    check_settings(tmp_path / "settings.json", Settings(seeds=2))
    check_settings(tmp_path / "settings.json", Settings(seeds=1))  # nothing was made with 2
    check_settings(tmp_path / "settings.json", Settings(seeds=2))
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="prompts 48, not 8"):
        reproduce(["main"], tmp_path, Settings(seeds=2, prompts=8))
    check_settings(tmp_path / "settings.json", Settings(seeds=3))  # a seed is a run of its own
    with pytest.raises(UserError, match="seeds 3, not 2"):
        reproduce(["main"], tmp_path, Settings(seeds=2))
    check_settings(tmp_path / "settings.json", Settings(guidance_scale=1.0))  # the recipe's, said outright
    with pytest.raises(UserError, match=r"guidance_scale 1\.0, not 3\.0"):
        reproduce(["main"], tmp_path, Settings(guidance_scale=3.0))


def test_an_output_knows_the_content_of_what_it_names(tmp_path):
    kept = tmp_path / "settings.json"
    check_settings(kept, Settings())  # of a version without digests
    (tmp_path / "runs").mkdir()
    found = digests(Settings(), lgms=True)
    assert list(found) == ["recipe tiny", "weights of the pipeline embedded", "weights of the LGM embedded",
                           "geometry model behind the LGM embedded", "LGM recipe lgm-tiny"]  # fmt: skip
    check_settings(kept, Settings(), found)
    for name, digest in found.items():
        with pytest.raises(UserError, match=f"another content of the {name} .{digest}, now 0{{12}}.;.*--output"):
            check_settings(kept, Settings(), found | {name: "0" * 12})
    check_settings(kept, Settings(), digests(Settings()))  # a call that trains no LGM
    assert json.loads(kept.read_text())["digests"] == found
    edited = Settings(overrides=("grpo.kl=0.01",))
    assert digests(edited)["recipe tiny"] != found["recipe tiny"]
    assert digests(Settings(overrides=("updates=41",)))["recipe tiny"] != found["recipe tiny"]
    assert digests(Settings(overrides=("sampling.micro_batch=4",)))["recipe tiny"] == found["recipe tiny"]


def test_a_digest_of_weights_sees_bytes_of_small_models_and_sizes_of_large_ones(tmp_path, monkeypatch):
    assert weights_digest(tmp_path / "none") is None
    (tmp_path / "vae").mkdir()
    weights, config = tmp_path / "vae" / "model.safetensors", tmp_path / "vae" / "config.json"
    weights.write_bytes(b"one")
    first = weights_digest(tmp_path)
    (tmp_path / "audit.json").write_text("{}")  # comes and goes beside the same model
    assert weights_digest(tmp_path) == first
    weights.write_bytes(b"two")
    second = weights_digest(tmp_path)
    config.write_text('{"latents_mean": [0]}')
    assert len({first, second, weights_digest(tmp_path)}) == 3
    monkeypatch.setattr(digests_module, "LARGE", 2)
    large = weights_digest(tmp_path)
    weights.write_bytes(b"six")
    assert weights_digest(tmp_path) == large
    weights.write_bytes(b"four")
    assert weights_digest(tmp_path) != large
