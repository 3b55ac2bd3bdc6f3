"""What a recipe has no use for: arms that equal another or cannot run, and judges of another world."""

from __future__ import annotations

import argparse
import json
from functools import partial

import pytest

from vggrpo.commands.reproduce import add_parser
from vggrpo.errors import UserError
from vggrpo.evaluation.metrics import select
from vggrpo.reproduce import TABLES, Settings, cells, reproduce, run
from vggrpo.reproduce import arms as arms_module
from vggrpo.reproduce.arms import chosen_arms, objections
from vggrpo.reproduce.judging import chosen_metrics, left_out
from vggrpo.reproduce.recipes import arm_named
from vggrpo.reproduce.settings import arm_config, check_settings

WAN = Settings(config="wan2.1-t2v-1.3b", device="cpu")


def test_the_embedded_recipe_has_a_use_for_every_arm():
    assert all(objections(name, Settings()) == {} for name in TABLES)


def test_an_arm_that_equals_another_is_left_out_and_refused_by_name(tmp_path):
    found = objections("rewards", WAN)  # no hinge, no options
    assert found == {name: "it equals vggrpo in every field" for name in ("no-hinge", "no-presence", "paper-rewards")}
    assert objections("geometry", WAN)["flow-masks"] == "it equals vggrpo in every field"  # by the default of `movers`
    left = [arm.name for arm in chosen_arms("rewards", (), WAN)]
    assert "vggrpo" in left and "no-kl" in left and not found.keys() & set(left)
    with pytest.raises(UserError, match=r"arm no-hinge of rewards .* wan2\.1-t2v-1\.3b: it equals vggrpo"):
        reproduce(["rewards"], tmp_path, WAN, arms=["no-hinge"])
    assert not list(tmp_path.iterdir())
    assert any(line.startswith("left out of rewards: no-hinge: it equals") for line in run.notes(["rewards"], (), WAN))
    no_kl = Settings(overrides=("grpo.kl=0",))
    assert objections("rewards", no_kl) == {"no-kl": "it equals vggrpo in every field"}


def test_an_arm_that_cannot_run_is_known_before_any_work(tmp_path, monkeypatch):
    assert "reward.geometry=DIR" in objections("main", WAN)["dpo-geometry"]
    assert "reward.geometry=DIR" in objections("geometry", WAN)["rgb"] and "dpo-epipolar" not in objections("main", WAN)
    named = Settings(config=WAN.config, overrides=("reward.geometry=facebook/VGGT-1B",))
    assert "dpo-geometry" not in objections("main", named)
    (tmp_path / "config.json").write_text(json.dumps({"backend": "any4d", "geometry": "airlabshare/any4d-checkpoint"}))
    flow = f"lgm.path={tmp_path}", "rewards.geometry_reprojection_consistency.options.movers=dynamic"
    assert "subject masks" in objections("rewards", Settings(overrides=flow))["rigidity"]
    with pytest.raises(UserError, match=r"arm vggrpo of main .* subject masks"):  # the recipe itself asks for them
        chosen_arms("main", (), Settings(overrides=flow[:1]))
    wrong = Settings(overrides=("algorithm=grpo", "rewards.camera_motion_smoothness.options.epsilon=1"))
    with pytest.raises(UserError, match="no option 'epsilon'"):
        chosen_arms("main", (), wrong)


def test_embedded_judges_measure_the_embedded_world_only():
    fast = [metric.name for metric in select("fast")]
    assert chosen_metrics(Settings()) == fast and left_out(Settings()) is None
    kept, line = chosen_metrics(WAN), left_out(WAN)
    assert all(not metric.needs for metric in select(kept)) and "epipolar_inliers" in kept
    assert set(fast) - set(kept) == set(line.removeprefix("not measured: ").split(":")[0].split(", "))
    assert "--judge" in line and line in run.notes(["main"], ["sft"], WAN)
    judged = Settings(config=WAN.config, judge="facebook/VGGT-1B")
    assert "judge_reprojection" in chosen_metrics(judged) and "adherence" not in chosen_metrics(judged)
    assert chosen_metrics(Settings(metrics="motion_flow,adherence")) == ["motion_flow", "adherence"]
    with pytest.raises(UserError, match="no metric is left"):
        chosen_metrics(Settings(config=WAN.config, metrics="adherence"))
    with pytest.raises(UserError, match="unknown metric"):
        chosen_metrics(Settings(metrics="sharpnes"))


def test_a_missing_judge_is_known_before_any_work(tmp_path):
    with pytest.raises(UserError, match="--judge /none does not exist"):
        reproduce(["main"], tmp_path, Settings(judge="/none"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(device="cpu"), (8.0, 8, None)),
        (WAN, (16.0, 1, None)),
        (Settings(config=WAN.config, device="cpu", judge="some/judge", fps=12.0, batch=2), (12.0, 2, "some/judge")),
    ],
)
def test_videos_are_made_and_measured_as_the_settings_say(tmp_path, monkeypatch, settings, expected):
    asked = {}

    def fake_generate(prompts, output, **options):
        asked.update(options)
        return output / "manifest.jsonl"

    def fake_evaluate(manifest, output, metrics, *, models):
        asked.update(metrics=metrics, judge=models._sources["judge"])
        output.mkdir(parents=True)
        (output / "metrics.jsonl").write_text("")
        return output / "metrics.jsonl"

    monkeypatch.setattr(cells, "generate_videos", fake_generate)
    monkeypatch.setattr(cells, "evaluate_manifest", fake_evaluate)
    cells.measured(cells.BASE, 0, "static", tmp_path, settings, lambda _: None)
    assert (asked["fps"], asked["micro_batch"], asked["judge"]) == expected
    assert asked["metrics"] == chosen_metrics(settings)
    assert arm_config(arm_named("dpo-epipolar"), settings, tmp_path, 0).dpo.fps == expected[0]


@pytest.mark.parametrize(("evaluated", "made"), [(1.0, 3.0), (3.0, 3.0), (5.0, 5.0)])
def test_pairs_are_made_of_guided_clips_whatever_is_evaluated(evaluated, made, tmp_path):
    found = arm_config(arm_named("dpo-epipolar"), Settings(guidance_scale=evaluated), tmp_path, 0)
    assert found.sampling.guidance_scale == made


def test_the_embedded_classifier_compares_no_features_of_other_pipelines(tmp_path, monkeypatch):
    def asked(*_, **__):
        raise LookupError("the classifier was asked")

    entry = {"value": 0.5, "unit": "", "valid": True, "reason": None}
    rows = [{"path": f"{i}.mp4", "prompt": f"{i}", "seed": 0, "arm": "x", "metrics": {"motion_flow": entry}}
            for i in range(3)]  # fmt: skip
    monkeypatch.setattr(cells, "reference_clips", asked)
    runs = {"base": [rows], "sft": [rows]}
    compare = partial(cells.compared, arm_named("sft"), cells.BASE, runs, ["static"], tmp_path)
    row = compare(WAN)
    assert row["checks"]["quality"]["about"] == "not measured" and cells.KERNEL_DISTANCE not in row["metrics"]
    with pytest.raises(LookupError):
        compare(Settings())


def test_what_is_measured_may_change_in_an_output_and_the_frame_rate_not(tmp_path):
    kept = tmp_path / "settings.json"
    check_settings(kept, Settings())
    (tmp_path / "runs").mkdir()
    check_settings(kept, Settings(judge="some/judge", metrics="all", batch=2))
    with pytest.raises(UserError, match=r"fps None, not 16\.0"):
        check_settings(kept, Settings(fps=16.0))


def test_the_command_hands_them_on(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(
        "vggrpo.reproduce.reproduce", lambda names, output, settings, arms: found.append(settings) or []
    )
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    options = ["--judge", "D", "--metrics", "all", "--fps", "16", "--batch", "1"]
    for extra in (options, []):
        arguments = parser.parse_args(["reproduce", "main", *extra])
        arguments.run(arguments)
    assert [(s.judge, s.metrics, s.fps, s.batch) for s in found] == [("D", "all", 16.0, 1), (None, "fast", None, None)]


def test_defaults_of_a_reward_are_those_of_its_function():
    options = arms_module.default_options("geometry_reprojection_consistency")
    assert options["movers"] == "dynamic" and "context" not in options and "prediction" not in options
