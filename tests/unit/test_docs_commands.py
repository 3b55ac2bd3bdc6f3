"""What README and docs tell people to type is understood, and the recipes fit together and are explained."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from vggrpo.cli import build_parser
from vggrpo.config import load_config
from vggrpo.config_benchmark import load_benchmark_config
from vggrpo.config_lgm import load_lgm_config

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
CALL = re.compile(r"(?:^\s*|exec )vggrpo (.*)|vggrpo\.cli (.*)")
LOADERS = {"train": load_config, "train-lgm": load_lgm_config, "benchmark": load_benchmark_config}
WAN = sorted((ROOT / "configs").glob("wan*.yaml"))


def commands():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if called := CALL.search(line):
                    words = shlex.split((called[1] or called[2]).rstrip("'"), comments=True)
                    yield pytest.param(words, id=f"{page.stem}: {' '.join(words[:3])}")


@pytest.mark.parametrize("words", commands())
def test_a_documented_command_is_understood(words):
    arguments = build_parser().parse_args(words)
    if words[:1] == ["train"] and words[1].startswith("wan"):  # no prompts are shipped for them
        assert any(word.startswith("data.prompts=") for word in words)
    if arguments.command in LOADERS and "level_horizon" not in " ".join(words):  # the reward that its page writes
        LOADERS[arguments.command](words[1], [word for word in words[2:] if "=" in word])


def test_there_are_commands():
    assert len(list(commands())) > 30


@pytest.mark.parametrize("recipe", WAN, ids=lambda path: path.stem)
def test_a_wan_recipe_reads_the_lgm_that_its_lgm_recipe_writes(recipe):
    made = {f"{load_lgm_config(path).output}/lgm" for path in (ROOT / "configs").glob("lgm-wan*.yaml")}
    assert load_config(recipe).lgm.path in made


@pytest.mark.parametrize("recipe", WAN, ids=lambda path: path.stem)
def test_every_field_of_a_wan_recipe_is_explained(recipe):
    table = (ROOT / "docs" / "post_train_wan.md").read_text(encoding="utf-8").split("## Field by field")[1]
    cells = [line.split("|")[1] for line in table.split("##")[0].splitlines() if line.startswith("| `")]
    explained = set()
    for cell in cells:
        section = ""
        for name in re.findall(r"`([\w.]+)`", cell):
            section = name.rpartition(".")[0] or section
            explained |= {name, f"{section}.{name}"}
    for key, value in yaml.safe_load(recipe.read_text()).items():
        names = [f"{key}.{name}" for name in value] if isinstance(value, dict) and key != "rewards" else [key]
        assert not [name for name in names if name not in explained]


def test_a_geometry_backend_is_told_all_that_the_protocol_asks_for():
    from vggrpo.models import GeometryModel

    page = (ROOT / "docs" / "add_geometry_backend.md").read_text(encoding="utf-8")
    table = page.split("## What the file holds")[1].split("## ")[0]
    methods = {name for name in vars(GeometryModel) if not name.startswith("_")}
    asked = methods | set(GeometryModel.__annotations__) | {"forward"}  # what `__call__` of a module is
    assert len(asked) > 10
    assert asked <= set(re.findall(r"`(\w+)[`(]", table))
