"""Rewards by name: built in, from other packages, unknown, broken."""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint

import pytest

from vggrpo.errors import UserError
from vggrpo.rewards import camera_motion_smoothness, get_reward, registry


@pytest.fixture
def offered(monkeypatch):
    points = [
        EntryPoint("travel_of_others", "vggrpo.rewards:camera_travel", registry.ENTRY_POINTS),
        EntryPoint("camera_motion_smoothness", "nowhere:taken", registry.ENTRY_POINTS),
        EntryPoint("broken", "no_such_package:reward", registry.ENTRY_POINTS),
        EntryPoint("number", "vggrpo.demo:PROMPTS", registry.ENTRY_POINTS),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    registry.get_reward.cache_clear()
    yield
    registry.get_reward.cache_clear()


def test_a_plugin_is_found_and_cannot_take_a_name_of_ours(offered):
    assert get_reward("travel_of_others").__name__ == "camera_travel"
    assert get_reward("camera_motion_smoothness") is camera_motion_smoothness


@pytest.mark.parametrize(
    "name, said", [("broken", "no_such_package"), ("number", "no function"), ("travel_of_other", "'travel_of_others'")]
)
def test_what_cannot_be_used_is_one_line(offered, name, said):
    with pytest.raises(UserError, match=said) as error:
        get_reward(name)
    assert "\n" not in str(error.value)


def test_an_option_that_a_reward_does_not_have_is_refused_beforehand(offered):
    registry.check_options("camera_motion_smoothness", {"eps_rotation": 0.1})
    with pytest.raises(UserError, match="no option 'eps_rotatoin'; the nearest that it has is 'eps_rotation'"):
        registry.check_options("camera_motion_smoothness", {"eps_rotatoin": 0.1})
    with pytest.raises(UserError, match="no option 'context'"):
        registry.check_options("camera_motion_smoothness", {"context": None})


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("camera_motion_smoothness", "eps_rotation", "small"),
        ("camera_motion_smoothness", "eps_translation", float("nan")),
        ("geometry_reprojection_consistency", "movers", "everything"),
        ("geometry_reprojection_consistency", "tolerance", -0.1),
        ("geometry_reprojection_consistency", "stride", 0),
        ("subject_rigidity", "min_pixels", 1.5),
        ("camera_motion_hinge", "keep", None),
    ],
)
def test_a_value_that_an_option_cannot_take_is_refused_beforehand(name, option, value):
    with pytest.raises(UserError, match=f"the reward '{name}' has {option} ") as error:
        registry.check_options(name, {option: value})
    assert "\n" not in str(error.value)


def test_every_default_of_an_option_is_a_value_that_it_can_take():
    for name, reward in registry.REWARDS.items():
        parameters = inspect.signature(reward).parameters.values()
        registry.check_options(name, {p.name: p.default for p in parameters if p.name not in ("prediction", "context")})


def test_the_example_of_the_documentation_is_a_reward():
    import re
    from pathlib import Path

    import torch
    from boxroom import clips

    text = (Path(__file__).resolve().parents[2] / "docs" / "write_a_reward.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    room = clips(["truck", "pan"])
    level = names["level_horizon"](room)
    assert level.valid.all() and torch.allclose(level.value, torch.ones(2).double())
    rolled = room.cam2world.clone()
    turn = torch.tensor([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]).double()
    rolled[:, 2, :3, :3] = rolled[:, 2, :3, :3] @ turn
    room.cam2world = rolled
    assert (names["level_horizon"](room).value < level.value).all()
