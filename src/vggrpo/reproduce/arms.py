"""Which arms of a table make sense with a recipe: one that equals another in every field would be trained for nothing,
and one that cannot run is better known before the first training than after it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from vggrpo.config import EMBEDDED, TrainConfig
from vggrpo.errors import UserError
from vggrpo.models.pretrained import read_config
from vggrpo.reproduce.lgms import geometry_behind, model_directory
from vggrpo.reproduce.recipes import TABLES, VGGRPO, Arm, arm_named
from vggrpo.reproduce.settings import Settings, arm_config
from vggrpo.rewards.registry import check_options, get_reward

_NOWHERE = Path("nowhere")  # an output that configs name and nothing writes


def chosen_arms(name: str, only: Sequence[str], settings: Settings) -> list[Arm]:
    """The arms of a table that were asked for, or all that make sense with the recipe; a study has none.

    Raises:
        UserError: one that was asked for makes no sense, or VGGRPO itself cannot run.
    """
    if name not in TABLES:
        return []
    against = objections(name, settings)
    chosen = [arm for arm in TABLES[name].arms if not only or arm.name in only]
    for arm in chosen:
        if arm.name in against and (only or arm is VGGRPO):
            raise UserError(f"the arm {arm.name} of {name} with the recipe {settings.config}: {against[arm.name]}")
    return [arm for arm in chosen if arm.name not in against]


@cache
def objections(name: str, settings: Settings) -> dict[str, str]:
    """By arm of a table, what speaks against it with this recipe; arms that make sense are not in it."""
    settings = replace(settings, quick=False)  # the smallest sizes make arms alike that are not
    found: dict[str, str] = {}
    seen: dict[str, dict[str, Any]] = {}
    for arm in sorted(TABLES[name].arms, key=lambda each: each is not VGGRPO):  # others equal it, not it them
        reason = why_not(arm, settings)
        if reason is None:
            fields = decisive_fields(arm, settings)
            same = next((other for other, theirs in seen.items() if theirs == fields), None)
            seen[arm.name] = fields
            reason = None if same is None else f"it equals {same} in every field"
        if reason is not None:
            found[arm.name] = reason
    return found


def why_not(arm: Arm, settings: Settings) -> str | None:
    """Why an arm cannot run with this recipe, None if nothing says so."""
    owner = arm_named(arm.lora_of) if arm.lora_of else arm
    if owner.train is None:
        return None
    try:
        config = arm_config(owner, settings, _NOWHERE, 0)
        for name, term in config.rewards.items():
            check_options(name, term.options)
    except UserError as error:
        return f"it cannot run: {error}"
    if reads_frames(config) and config.reward.geometry == EMBEDDED and config.model.path != EMBEDDED:
        return (
            "it cannot run: the embedded geometry model reads frames of the embedded world only; name one with --set "
            "reward.geometry=DIR"
        )
    asking = ("subject_rigidity", "subject_presence_hinge")
    wanting = [n for n, term in config.rewards.items() if n in asking or term.options.get("movers") == "subject"]
    if wanting and owner.lgm is None and not predicts_subjects(config):
        return f"it cannot run: {wanting[0]} needs a geometry model with subject masks, and this recipe's has none"
    return None


def reads_frames(config: TrainConfig) -> bool:
    """Whether a geometry model reads decoded frames in this training."""
    return config.reward.space == "rgb" or (config.algorithm == "dpo" and config.dpo.pairs == "geometry")


def predicts_subjects(config: TrainConfig) -> bool:
    """Whether the network that the rewards are read from has subject masks: those of our own light decoder do. True
    where that is not known, such as for an LGM that is not there yet."""
    if config.reward.space == "rgb":
        geometry = model_directory(config.reward.geometry, "geometry")
        return not geometry.is_dir() or has_light_decoder(geometry)
    if _read(model_directory(config.lgm.path, "lgm")).get("backend", "vggt") != "vggt":
        return False
    behind = geometry_behind(config.lgm.path)
    return behind is None or has_light_decoder(behind)


def has_light_decoder(geometry: Path) -> bool:
    """Whether the geometry model in this directory is one of ours; public weights come without such a config."""
    values = _read(geometry)
    return values.get("model_type") == "vggt" and values.get("decoder", "light") == "light"


def decisive_fields(arm: Arm, settings: Settings) -> dict[str, Any]:
    """All that makes an arm what it is; rewards with the options that they have by default, and without those that
    weigh nothing."""
    fields: dict[str, Any] = {name: getattr(arm, name) for name in
                              ("lgm", "seconds_of", "lora_of", "guidance", "guided_every", "detach",
                               "candidates")}  # fmt: skip
    if arm.train is None:
        return fields
    config = arm_config(arm, settings, _NOWHERE, 0)
    values = config.model_dump(mode="json", exclude={"output", "rewards"})
    if arm.lgm is not None:
        del values["lgm"]["path"]  # named after the arm
    rewards = {name: (term.weight, default_options(name) | term.options)
               for name, term in config.rewards.items() if term.weight > 0}  # fmt: skip
    return fields | {"config": values, "rewards": rewards}


def default_options(reward: str) -> dict[str, Any]:
    """What a reward does where a recipe says nothing."""
    parameters = list(inspect.signature(get_reward(reward)).parameters.values())[1:]  # the first is the geometry
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "context"}


def _read(directory: Path) -> dict[str, Any]:
    """`config.json` of a model, nothing where there is none."""
    try:
        return read_config(directory)
    except (OSError, ValueError):
        return {}
