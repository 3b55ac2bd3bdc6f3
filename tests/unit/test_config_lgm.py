"""Recipes of Latent Geometry Models: parsed, with the paper's numbers, one line for what is wrong; the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import yaml
from pydantic import BaseModel

from vggrpo.cli import main
from vggrpo.config import load_config
from vggrpo.config_lgm import TrainLGMConfig, check_resumable, dump_lgm_config, load_lgm_config
from vggrpo.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("lgm-*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_survives_a_round_trip(recipe):
    config = load_lgm_config(recipe)
    assert load_lgm_config(yaml.safe_load(dump_lgm_config(config))) == config == load_lgm_config(recipe.stem)


@pytest.mark.parametrize("name", ["lgm-wan2.1-any4d", "lgm-wan2.2-any4d"])
def test_paper_numbers(name):
    config = load_lgm_config(name)
    distill = config.distill
    assert (distill.lora_rank, distill.lora_alpha, distill.learning_rate, distill.weight_decay) == (64, 32, 2e-4, 0)
    assert (distill.warmup_updates, distill.grad_clip, distill.bf16) == (100, 1.0, True)
    clips = config.clips
    assert "any4d" in config.geometry.path and clips.generated_share > 0 and clips.num_frames % 4 == 1
    # The clips that are trained on: real ones, generated ones, without those held out.
    trained = clips.max_clips / (1 - clips.generated_share) * (1 - clips.heldout_share)
    assert config.updates == round(20 * trained / distill.batch)


def test_overrides_and_places():
    config = load_lgm_config("lgm-tiny", ["output=runs/x", "seed=3", "updates=5", "save_every=2"])
    assert (config.seed, config.updates, config.save_every) == (3, 5, 2)
    assert config.cache_directory == Path("runs/x/cache")
    assert load_lgm_config("lgm-tiny", ["cache=c"]).cache_directory == Path("c")
    weights = load_lgm_config("lgm-tiny", ["distill.weights={flow: 0}"]).distill.weights
    assert weights["flow"] == 0 and weights["depth"] == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distil.batch=3", "nearest known key is 'distill'"),
        ("distill.batchh=2", "nearest known key is 'distill.batch'"),
        ("grpo.kl=1", "unknown config key 'grpo'"),
        ("video.kind=image", "generates no clips"),
        ("distill.weights={depht: 1}", "weights are 0 or more"),
        ("distill.weights={depth: -1}", "weights are 0 or more"),
        ("clips.generated_share=1", "generated_share"),
        ("updates=0", "'updates'"),
    ],
)
def test_bad_values_are_one_line(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_lgm_config("lgm-tiny", [override])
    assert "\n" not in str(error.value)


def test_cross_field_errors_name_the_remedy():
    with pytest.raises(UserError, match=r"needs video\.path"):
        load_lgm_config("lgm-tiny", ["video.kind=image", "clips.generated_share=0"])
    with pytest.raises(UserError, match="give one of the two"):
        load_lgm_config("lgm-tiny", ["stitch.layer=1", "stitch.layers=[1]"])


def test_only_what_does_not_matter_may_change_at_resume():
    config = load_lgm_config("lgm-tiny")
    saved = config.model_dump(mode="json")
    check_resumable(saved, load_lgm_config("lgm-tiny", ["updates=9", "output=x", "save_every=1", "keep_last=9"]))
    check_resumable(
        saved, load_lgm_config("lgm-tiny", ["distill.micro_batch=1", "distill.gradient_checkpointing=true"])
    )
    with pytest.raises(UserError, match=r"clips\.width: was 64, is 32"):
        check_resumable(saved, load_lgm_config("lgm-tiny", ["clips.width=32"]))


def test_every_field_is_documented():
    def fields(model):
        for name, info in model.model_fields.items():
            yield f"{model.__name__}.{name}", info
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                yield from fields(info.annotation)

    assert [name for name, info in fields(TrainLGMConfig) if not info.description] == []


def test_imports_no_torch():
    code = "import sys, vggrpo.config_lgm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command(monkeypatch, capsys):
    from vggrpo.pretraining import distill

    call = create_autospec(distill.train_lgm, return_value=Path("result"))
    monkeypatch.setattr(distill, "train_lgm", call)
    assert main(["train-lgm", "lgm-tiny", "updates=2", "--search-only"]) == 0
    assert call.call_args.args[0].updates == 2 and call.call_args.kwargs == {"search_only": True}
    assert "result" in capsys.readouterr().out
    assert main(["train-lgm", "lgm-tiny", "updatess=2"]) == 2
    assert "nearest known key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("load", "recipe", "command"),
    [
        (load_lgm_config, "tiny", "train"),
        (load_config, "lgm-tiny", "train-lgm"),
        (load_config, "benchmark-tiny", "benchmark"),
    ],
)
def test_a_recipe_of_another_command_names_that_command(load, recipe, command):
    with pytest.raises(UserError, match=f"{recipe} is a recipe of `vggrpo {command}`"):
        load(recipe)
