"""Cells of a reproduction: LGMs of equal size, equal seconds, guidance that is exactly off, and the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vggrpo.cli import main
from vggrpo.config import load_config
from vggrpo.errors import UserError
from vggrpo.io.manifest import ManifestRow, write_manifest
from vggrpo.reproduce import TABLES, Settings, cells, lgms
from vggrpo.reproduce import plan as plan_module
from vggrpo.reproduce.cells import same_latents, seeds_check, trained
from vggrpo.reproduce.lgms import audited_lgm, lgm_config
from vggrpo.reproduce.plan import Costs, budget, plan_lines
from vggrpo.reproduce.recipes import arm_named, equal_budget
from vggrpo.reproduce.settings import arm_config, seconds_of
from vggrpo.rewards.registry import audited_options

OWN_LGM = [arm for arm in TABLES["lgm"].arms if arm.lgm is not None]


@pytest.mark.parametrize(("config", "lgm"), [("tiny", "lgm-tiny"), ("wan2.1-t2v-1.3b", "lgm-wan2.1-any4d")])
def test_lgms_of_the_ablation_differ_in_one_thing(tmp_path, config, lgm):
    settings = Settings(config=config, lgm_config=lgm)
    found = {arm.name: lgm_config(arm, settings, tmp_path) for arm in OWN_LGM}
    clips = {name: c.clips.max_clips / (1 - c.clips.generated_share) for name, c in found.items()}
    assert max(clips.values()) - min(clips.values()) <= 2 and len({c.updates for c in found.values()}) == 1
    assert found["lgm-rendered-only"].clips.generated_share == 0 < found["lgm-recipe"].clips.generated_share
    rates = {name: c.stitch.view_rate for name, c in found.items()}
    assert rates == {"lgm-recipe": "latent", "lgm-rendered-only": "latent", "lgm-every-frame": "frame"}
    for arm in OWN_LGM:
        assert arm_config(arm, settings, tmp_path, 1).lgm.path == str(tmp_path / "lgms" / arm.name / "lgm")
    if config != "tiny":
        with pytest.raises(UserError, match="--lgm-config"):
            lgm_config(OWN_LGM[0], Settings(config=config), tmp_path)


def test_an_lgm_is_trained_once_and_audited_where_there_is_a_judge(tmp_path, monkeypatch):
    calls = []

    def fake_train(config, progress):
        calls.append("train")
        directory = Path(config.output) / "lgm"
        directory.mkdir(parents=True)
        (directory / "card.json").write_text('{"updates": 1}')

    def fake_audit(lgm, output, **options):
        calls.append("audit")
        if calls.count("audit") == 1:
            raise KeyboardInterrupt
        (Path(output) / "audit.json").write_text('{"ratio": 0.5}')

    monkeypatch.setattr(lgms, "train_lgm", fake_train)
    monkeypatch.setattr(lgms, "audit_reward", fake_audit)
    with pytest.raises(KeyboardInterrupt):
        audited_lgm(OWN_LGM[0], Settings(), tmp_path)
    for _ in range(2):
        audited_lgm(OWN_LGM[0], Settings(), tmp_path)
    assert calls == ["train", "audit", "audit"]
    assert lgms.about_lgm(OWN_LGM[0], tmp_path) == {"card": {"updates": 1}, "audit": {"ratio": 0.5}}


SECONDS = {"vggrpo": 6.0, "sft": 4.0, "dpo-epipolar": 24.0, "dpo-geometry": 2400.0}


@pytest.mark.parametrize("name", ["sft", "dpo-epipolar", "dpo-geometry", "nft", "direct"])
def test_rivals_of_equal_seconds_train_as_long_as_vggrpo(tmp_path, monkeypatch, name):
    configs = {}

    def fake_train(config, progress):
        run = Path(config.output).name.removesuffix("-s2")
        configs[run] = config
        log = Path(config.output) / "log.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        each = SECONDS.get(run, 1.0) / 4
        log.write_text("".join(json.dumps({"update": i, "seconds/total": each}) + "\n" for i in range(4)))
        return Path(config.output) / "lora"

    monkeypatch.setattr(cells, "train", fake_train)
    said, settings = [], Settings(updates=30)
    trained(arm_named(f"{name}-seconds"), 2, tmp_path, settings, said.append)
    same, found = arm_config(arm_named(name), settings, tmp_path, 2), configs[f"{name}-seconds"]
    assert configs["vggrpo"].algorithm == "grpo" and configs["vggrpo"].stop.seconds_above is None
    if name in ("nft", "direct"):
        assert said == ["train vggrpo, seed 2", f"train {name}-seconds, seed 2"]
        assert found.stop.seconds_above == 6.0 and found.updates > 10_000
        return
    assert said == ["train vggrpo, seed 2", f"train {name}, seed 2", f"train {name}-seconds, seed 2"]
    assert configs[name] == same and found.stop.seconds_above is None  # the time must not end its one pass
    section, before = getattr(found, found.algorithm), getattr(same, same.algorithm)
    assert before.candidates == 40  # 1,920 videos, 48 prompts
    assert section.candidates == {"sft": 60, "dpo-epipolar": 10, "dpo-geometry": 2}[name]
    # The best quarter; and the worst.
    clips = {"sft": 48 * 15, "dpo-epipolar": 2 * 48 * 2, "dpo-geometry": 2 * 48}[name]
    batch = {"sft": 16, "dpo": 16}[found.algorithm]
    assert found.updates == clips // batch  # one pass over them


def test_seconds_are_those_of_all_updates():
    assert seconds_of([{"seconds/total": 0.25}] * 3) == 0.8
    for arm in TABLES["main-seconds"].arms:
        assert arm.name == "vggrpo" or arm.seconds_of == "vggrpo"


def test_one_training_run_is_no_claim_about_a_method():
    assert seeds_check(3)[0] and not seeds_check(1)[0]
    assert seeds_check(1)[1] == "training seeds: 1; a claim needs 3"


def make_latents(folder: Path, values: dict[str, float]) -> Path:
    """A manifest with the latents, all of one value, of each prompt's video."""
    rows = [ManifestRow(f"arm/{i}.mp4", prompt, 0, 8.0, "arm") for i, prompt in enumerate(values)]
    for row, value in zip(rows, values.values(), strict=True):
        file = (folder / row.path).with_suffix(".safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.full((2,), value)}, file)
    return write_manifest(folder / "manifest.jsonl", rows)


def test_equal_latents_are_equal_bit_for_bit(tmp_path):
    values = {"a": {"p": 1.0}, "b": {"p": 1.0}, "c": {"p": 1.0 + 1e-7}, "d": {"p": 1.0, "q": 1.0}}
    made = {name: make_latents(tmp_path / name, each) for name, each in values.items()}
    assert same_latents(made["a"], made["b"]) and not same_latents(made["a"], made["c"])
    assert not same_latents(made["a"], made["d"])
    assert arm_named("guided-0").guidance == 0.0  # off, and asked for


@pytest.mark.parametrize("name", ["guided-100", "best-of-4"])
def test_steering_reads_the_rewards_as_the_recipe_has_them(monkeypatch, name):
    made = {}

    def fake_reward(lgm, weights, options=None):
        made["options"] = options

    monkeypatch.setattr(cells, "load_lgm", lambda path, device, spec: None)
    monkeypatch.setattr(cells, "WeightedLatentReward", fake_reward)
    steering = cells._steering(arm_named(name), Settings().recipe(), Settings(device="cpu"))
    expected = audited_options(Settings().recipe().rewards)
    assert made["options"] == expected and expected["geometry_reprojection_consistency"]["movers"] == "subject"
    (settings,) = filter(None, steering.settings().values())
    assert settings["reward"] == "motion + geometry" and settings["options"] == expected
    plain = cells._steering(arm_named(name), load_config({}), Settings(device="cpu"))
    assert all("options" not in (value or {}) for value in plain.settings().values())  # as outputs without any say it


def test_equal_latents_over_several_sets_are_those_of_the_rows(tmp_path):
    for prompt_set, prompt in (("static", "p"), ("dynamic", "q")):
        for name, value in (("base-s0", 1.0), ("same-s0", 1.0), ("other-s0", 2.0)):
            make_latents(tmp_path / prompt_set / name, {prompt: value})
    base, same, other = (
        cells.joined_manifest(["static", "dynamic"], name, tmp_path) for name in ("base-s0", "same-s0", "other-s0")
    )
    assert base.parent == other.parent == tmp_path  # one directory: it cannot tell the arms apart
    assert same_latents(base, same) and not same_latents(base, other)


COSTS = Costs(video=1.0, gradient=0.5, start=10.0, sampled=2.0, lgm_clip=3.0, lgm_update=4.0, cores=0.5)


def test_a_plan_names_each_cell_once_and_knows_what_is_done(tmp_path):
    settings = Settings(seeds=2, prompts=4, videos=2, updates=3)
    names = ["main", "main-seconds", "lgm", "stitch", "robustness"]
    found = plan_module.cells(names, tmp_path, settings, (), COSTS)
    assert len({(cell.kind, cell.name) for cell in found}) == len(found)
    by_name = {(cell.kind, cell.name): cell for cell in found}
    assert sum(name.startswith("vggrpo, seed") for kind, name in by_name if kind == "train") == 2
    config = arm_config(arm_named("vggrpo"), settings, tmp_path, 0)
    videos, gradients = budget(config)
    assert videos == 3 * 4 * 16 and gradients == videos * config.sampling.window
    assert by_name["train", "vggrpo, seed 0"].seconds == 10 + videos + gradients / 2
    alone = plan_module.cells(["main-seconds"], tmp_path, settings, ["sft-seconds"], COSTS)  # its clips follow from sft
    assert [c.name for c in alone if c.kind == "train"][::2] == ["sft-seconds, seed 0", "vggrpo, seed 0", "sft, seed 0"]
    assert by_name["train", "sft-seconds, seed 1"].seconds == by_name["train", "vggrpo, seed 1"].seconds
    assert by_name["videos", "world-static/base-s0"].seconds == 4 * 2 * 2.0
    assert by_name["LGM", "lgm-every-frame"].seconds > 2 * by_name["LGM", "lgm-recipe"].seconds
    assert by_name["LGM", "lgm-layer-2"].seconds == by_name["LGM", "lgm-recipe"].seconds
    assert by_name["analysis", "robustness"].seconds is None
    run = tmp_path / "runs" / "vggrpo-s0"
    (run / "lora").mkdir(parents=True)
    (run / "log.jsonl").write_text("".join(json.dumps({"update": i}) + "\n" for i in range(3)))
    again = plan_module.cells(names, tmp_path, settings, (), COSTS)
    assert [cell.name for cell in again if cell.done] == ["vggrpo, seed 0"]
    lines = plan_lines(again, COSTS)
    assert any("vggrpo, seed 0" in line and line.endswith("done") for line in lines)
    seconds = sum(cell.seconds for cell in again if not cell.done and cell.seconds is not None)
    assert f"{seconds / 3600:.1f} hours" in lines[-1] and f"({seconds / 7200:.1f} core-hours)" in lines[-1]
    assert f"{len(found) - 1} of {len(found)} cells" in lines[-1] and "1 that are not estimated" in lines[-1]


@pytest.mark.parametrize("arm", ["sft", "dpo-epipolar", "nft", "direct", "vggrpo"])
def test_a_plan_counts_what_the_budget_says(tmp_path, arm):
    found = budget(arm_config(arm_named(arm), Settings(), tmp_path, 0))
    reference = budget(arm_config(arm_named("vggrpo"), Settings(), tmp_path, 0))
    assert found[0] == pytest.approx(reference[0], rel=0.05)
    if arm in ("vggrpo", "nft"):
        assert found[1] == pytest.approx(reference[1], rel=0.05)
    else:  # one pass over the clips, or the last step alone
        assert 0 < found[1] < reference[1]
    assert equal_budget(arm_config(arm_named(arm), Settings(), tmp_path, 0), 48)


def test_the_plan_of_a_study_has_every_mark(tmp_path):
    settings = Settings(seeds=1, prompts=4, videos=1, far=40, marks=4)
    found = plan_module.cells(["hacking"], tmp_path, settings, (), COSTS)
    names = [cell.name for cell in found if cell.kind == "videos"]
    assert "world-dynamic/far-bare-000040-s0" in names and len(names) == 2 * (1 + 2 * 4)


def test_the_command_plans_without_touching_the_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan_module, "trial", lambda folder, settings, lgm: COSTS)
    output = tmp_path / "out"
    assert main(["reproduce", "all", "--plan", "--output", str(output)]) == 0
    assert "cells to do: about" in capsys.readouterr().out and not output.exists()
    assert main(["reproduce", "main", "--plan", "--arms", "sftt", "--output", str(output)]) == 2
