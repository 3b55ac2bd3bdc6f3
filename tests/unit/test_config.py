"""The typed config: recipes, overrides, one-line errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from vggrpo.config import TrainConfig, dump_config, load_config, parse_config, recipe_path, resume_difference
from vggrpo.errors import UserError

ALL = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
RECIPES = [path for path in ALL if not path.stem.startswith(("lgm-", "benchmark-"))]  # in test_config_lgm.py, ...


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_survives_a_round_trip(recipe):
    config = load_config(recipe)
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert recipe_path(recipe.stem).stem == recipe.stem


def test_paper_numbers():
    config = load_config("wan2.1-t2v-1.3b")
    assert config.grpo.samples_per_prompt == 64 and config.grpo.clip == 1e-3 and config.grpo.kl == 0.004
    assert (config.lora.rank, config.lora.alpha, config.optim.learning_rate) == (32, 64, 1e-4)
    assert config.sampling.num_steps == 10 and config.sampling.guidance_scale == 1


def test_overrides():
    config = load_config(
        "tiny",
        [
            "updates=3",
            "grpo.kl=1e-2",
            "rewards.camera_motion_hinge.weight=0.25",
            "output=runs/a b",
            "sampling.shift=null",
        ],
    )
    assert config.updates == 3 and config.grpo.kl == 0.01 and config.output == "runs/a b"
    assert config.rewards["camera_motion_hinge"].weight == 0.25 and config.sampling.shift is None
    assert load_config({"rewards": {"camera_motion_smoothness": 2}}).rewards["camera_motion_smoothness"].weight == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("update=3", "nearest known key is 'updates'"),
        ("grpo.kll=3", "nearest known key is 'grpo.kl'"),
        ("learning_rate=3", "nearest known key is 'optim.learning_rate'"),
        ("updates=0", "'updates'"),
        ("updates=many", "'updates'"),
        ("optim.learning_rate=.inf", "'optim.learning_rate' is inf: input should be a finite number"),
        ("updates.x=3", r"'updates' is \{'x': 3\}"),
        ("grpo=3", "'grpo' is 3: input should be a section"),
        ("grpo.samples_per_prompt=1", "samples_per_prompt"),
        ("algorithm=ppo", "algorithm"),
        ("sampling.window=8", "sampling.window"),
        ("sampling.variant=flow_grpo_wan", "sigma_min"),
        ("grpo.base_travel_samples=0", "base_travel_samples"),
        ("updates", "key=value"),
        ("seed=[1", "YAML"),
    ],
)
def test_bad_values_are_one_line(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_config("tiny", [override])
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="tiny"):
        load_config("tinny")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="YAML: line 1: "):
        load_config(tmp_path / "broken.yaml")
    with pytest.raises(UserError, match="is a directory"):
        load_config(tmp_path)


def test_resume_difference_names_the_field():
    config = load_config("tiny")
    saved = config.model_dump(mode="json")
    assert resume_difference(saved, load_config("tiny", ["updates=99", "output=x", "save_every=1"])) is None
    assert "optim.learning_rate: was 0.001" in resume_difference(saved, load_config("tiny", ["optim.learning_rate=1"]))
    del saved["dpo"]["pairs_per_prompt"]  # a run of a version that did not have it
    assert resume_difference(saved, load_config("tiny")) is None
    assert "dpo.pairs_per_prompt: was 1, is 2" in resume_difference(
        saved, load_config("tiny", ["dpo.pairs_per_prompt=2"])
    )
    saved["dpo"]["gone"] = 1
    assert "dpo.gone: was 1, is None" in resume_difference(saved, load_config("tiny"))
    del saved["dpo"]["gone"]
    assert "rewards" in resume_difference(saved, load_config("tiny", ["rewards={camera_motion_smoothness: 1}"]))


def test_every_field_is_documented():
    def fields(model):
        for name, info in model.model_fields.items():
            yield f"{model.__name__}.{name}", info
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                yield from fields(info.annotation)

    assert [name for name, info in fields(TrainConfig) if not info.description] == []


def test_imports_no_torch():
    code = "import sys, vggrpo.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
