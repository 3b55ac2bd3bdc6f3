"""Recipes of benchmarks, and a run whose videos are made of noise: tags, resume, one line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from vggrpo.cli import main
from vggrpo.config_benchmark import BenchmarkConfig, dump_benchmark_config, load_benchmark_config
from vggrpo.errors import UserError
from vggrpo.evaluation import benchmark
from vggrpo.evaluation.benchmarks import load_prompt_sets
from vggrpo.evaluation.metrics import select
from vggrpo.io.manifest import ManifestRow, read_jsonl, read_manifest, write_manifest
from vggrpo.io.video import write_video

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("benchmark-*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_survives_a_round_trip(recipe):
    config = load_benchmark_config(recipe)
    assert load_benchmark_config(yaml.safe_load(dump_benchmark_config(config))) == config
    assert load_benchmark_config(recipe.stem) == config
    assert select(config.metrics) and load_prompt_sets(config.prompts, config.limit)


def test_there_is_a_recipe_for_the_laptop_and_for_wan():
    assert {recipe.stem for recipe in RECIPES} >= {"benchmark-tiny", "benchmark-wan2.1-t2v-1.3b"}
    assert len(load_prompt_sets(load_benchmark_config("benchmark-tiny", ["limit=48"]).prompts, 48)) == 96


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tuned_lora=null", "'tuned_lora'"),
        ("base_lora=runs/tiny/lora", "the same"),
        ("seeds=[0, 0]", "different"),
        ("seeds=[]", "'seeds'"),
        ("sampling.num_frames=16", "the nearest is 17"),
        ("sampling.step=3", "nearest known key is 'sampling.num_steps'"),
        ("prompts=[]", "'prompts'"),
    ],
)
def test_bad_values_are_one_line(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_benchmark_config("benchmark-tiny", [override])
    assert "\n" not in str(error.value)


def test_every_field_is_documented_and_nothing_needs_torch():
    def fields(model):
        for name, info in model.model_fields.items():
            yield f"{model.__name__}.{name}", info
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                yield from fields(info.annotation)

    assert [name for name, info in fields(BenchmarkConfig) if not info.description] == []
    code = "import sys, vggrpo.config_benchmark; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def generated(monkeypatch) -> list[str]:
    """Stands in for the generator; returns the arms that it was asked for."""
    asked: list[str] = []

    def generate(prompts, output, *, arm, seeds, fps, **options):
        asked.append(arm)
        rng = np.random.default_rng(len(arm))
        rows = []
        for index, prompt in enumerate(prompts):
            for seed in seeds:
                path = output / arm / f"{index}-{seed}.mp4"
                if not path.is_file():
                    write_video(path, rng.integers(0, 255, (9, 32, 32, 3), dtype=np.uint8), fps)
                rows.append(ManifestRow(f"{arm}/{path.name}", prompt, seed, fps, arm))
        return write_manifest(output / "manifest.jsonl", rows)

    monkeypatch.setattr(benchmark, "generate_videos", create_autospec(benchmark.generate_videos, side_effect=generate))
    return asked


def test_a_run_has_tags_statistics_a_report_and_goes_on(tmp_path, generated, capsys):
    (tmp_path / "lora").mkdir()
    arguments = [
        "benchmark", "benchmark-tiny", f"output={tmp_path / 'run'}", f"tuned_lora={tmp_path / 'lora'}", "limit=2",
        "metrics=sharpness,motion_flow", "lgm=null", "reference=null",
    ]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "report in" in said and "does not count" in said and generated == ["base", "tuned"]
    run = tmp_path / "run"
    rows = read_manifest(run / "tuned" / "manifest.jsonl")
    assert len(rows) == 8 and {row.tags[0] for row in rows} == {"static", "dynamic"}
    assert all(any(tag.startswith("camera:") for tag in row.tags) for row in rows)
    assert read_jsonl(run / "eval" / "base" / "metrics.jsonl")[0]["tags"] == list(rows[0].tags)
    comparison = json.loads((run / "comparison.json").read_text())
    assert comparison["prompts"] == 4 and set(comparison["metrics"]["sharpness"]["by_tag"]) >= {"static", "dynamic"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seeds"] == [0, 1] and "sharpness" in summary["metrics"]
    page = (run / "report" / "index.html").read_text()
    assert "Benchmark config" in page and "camera:" in page

    measured = (run / "eval" / "base" / "details.jsonl").read_text()
    assert main([*arguments, "workers=1", "metrics=sharpness"]) == 0  # how it runs may change
    assert (run / "eval" / "base" / "details.jsonl").read_text() == measured
    capsys.readouterr()
    assert main([*arguments, "limit=3"]) == 2
    assert "another benchmark (limit: was 2, is 3)" in capsys.readouterr().err


def test_what_failed_before_its_first_video_does_not_bind_what_follows(tmp_path, generated, capsys):
    arguments = ["benchmark", "benchmark-tiny", f"output={tmp_path / 'run'}", "metrics=sharpness", "lgm=null",
                 "reference=null", f"tuned_lora={tmp_path}"]  # fmt: skip
    config = load_benchmark_config("benchmark-tiny", [*arguments[2:], "limit=3"])
    benchmark._prepare(config)
    assert main([*arguments, "limit=1", "seeds=[0]"]) == 0 and generated == ["base", "tuned"]


def test_what_is_missing_is_said_before_anything_is_generated(tmp_path, generated, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "lora").mkdir()
    for overrides, message in [
        ([f"tuned_lora={tmp_path / 'none'}", f"output={tmp_path / 'run'}"], "vggrpo train"),
        ([f"tuned_lora={tmp_path / 'lora'}", f"output={tmp_path / 'mine'}"], "not empty"),
        ([f"tuned_lora={tmp_path / 'lora'}", f"output={tmp_path / 'run'}", "prompts=[statik]"], "no prompt set"),
        ([f"tuned_lora={tmp_path / 'lora'}", f"output={tmp_path / 'run'}", "judge=none"], "judge"),
    ]:
        assert main(["benchmark", "benchmark-tiny", *overrides]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert generated == [] and not (tmp_path / "run").exists()
