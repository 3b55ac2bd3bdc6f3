"""Rewards by name: the ones of this package, and those that other packages offer as entry points.

A package adds a reward with, in its pyproject.toml,

    [project.entry-points."vggrpo.rewards"]
    my_reward = "my_package.rewards:my_reward"
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from vggrpo.config import RewardTerm
from vggrpo.errors import UserError
from vggrpo.rewards.adherence import camera_adherence
from vggrpo.rewards.base import RewardFunction
from vggrpo.rewards.camera_motion import camera_motion_smoothness
from vggrpo.rewards.presence import subject_presence_hinge
from vggrpo.rewards.reprojection import geometry_reprojection_consistency
from vggrpo.rewards.rigidity import subject_rigidity
from vggrpo.rewards.travel import camera_motion_hinge

ENTRY_POINTS = "vggrpo.rewards"
REWARDS: dict[str, RewardFunction] = {
    "camera_motion_smoothness": camera_motion_smoothness,
    "geometry_reprojection_consistency": geometry_reprojection_consistency,
    "camera_motion_hinge": camera_motion_hinge,
    "subject_presence_hinge": subject_presence_hinge,
    "camera_adherence": camera_adherence,
    "subject_rigidity": subject_rigidity,
}

AUDITED = ("camera_motion_smoothness", "geometry_reprojection_consistency")  # the paper's two


def recipe_options(rewards: Mapping[str, RewardTerm], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a recipe's `rewards` say of the options of the rewards `names`; a default says nothing."""
    return {name: dict(rewards[name].options) for name in names if name in rewards and rewards[name].options}


def audited_options(rewards: Mapping[str, RewardTerm]) -> dict[str, dict[str, Any]]:
    """What a recipe's `rewards` say of the options of the two that an audit asks about."""
    return recipe_options(rewards, AUDITED)


def check_all_options(options: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> None:
    """`check_options` of each reward, and that it is one of `names`, which alone would read them.

    Raises:
        UserError: see `check_options`; or options of another reward.
    """
    known = list(names)
    for name, chosen in options.items():
        if name not in known:
            raise UserError(f"there are options for {name!r}, which is not asked; give those of {', '.join(known)}")
        check_options(name, chosen)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Ask before a roll-out what the reward called `name` would say after it.

    Raises:
        UserError: an unknown reward, an option that it does not have (the nearest that it has is named), or a value
            that is not of the option's annotated type.
    """
    reward = get_reward(name)
    parameters = list(inspect.signature(reward).parameters.values())[1:]  # the first is the geometry
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.name != "context"]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(str(option), known, n=1, cutoff=0.0)
            remedy = f"the nearest that it has is {near[0]!r}" if near else "it has none"
            raise UserError(f"the reward {name!r} has no option {option!r}; {remedy}")
    types = get_type_hints(reward, include_extras=True)
    for option, value in options.items():
        _check_value(name, option, value, types.get(option, Any))


def _check_value(name: str, option: str, value: Any, kind: Any) -> None:
    config = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
    try:
        create_model("_Option", __config__=config, value=(kind, ...))(value=value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise UserError(f"the reward {name!r} has {option} {value!r}: {message[0].lower()}{message[1:]}") from error


@cache
def get_reward(name: str) -> RewardFunction:
    """The reward called `name`; this package's own names win.

    Raises:
        UserError: an unknown name (the nearest known one is named), or a plug-in that cannot be imported.
    """
    if name in REWARDS:
        return REWARDS[name]
    plugins = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in plugins:
        known = [*REWARDS, *plugins]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown reward {name!r}; the nearest known is {near!r} (there are {', '.join(known)})")
    try:
        reward = plugins[name].load()
    except Exception as error:
        raise UserError(
            f"the reward {name!r} ({plugins[name].value}) cannot be imported: {type(error).__name__}: {error}; "
            "repair or uninstall the package that offers it"
        ) from error
    if not callable(reward):
        raise UserError(f"the reward {name!r} ({plugins[name].value}) is no function")
    return reward
