"""From a YAML recipe, a shipped one's name or plain values to a validated config, with `key=value` overrides on top.

The same for every kind of recipe; each error is one line that names the field and the remedy. Imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vggrpo.config_algorithms import Section
from vggrpo.errors import UserError

_SectionT = TypeVar("_SectionT", bound=Section)


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a shipped one ("tiny", "wan2.1-t2v-1.3b").

    Raises:
        UserError: when there is neither; the message lists the shipped names.
    """
    path = Path(name)
    if path.is_file():
        return path
    package = Path(__file__).resolve().parent
    folders = [package / "configs", package.parents[1] / "configs"]  # in a wheel, in a checkout
    stem = path.name.removesuffix(".yaml")
    if path.parent == Path("."):
        for folder in folders:
            if (folder / f"{stem}.yaml").is_file():
                return folder / f"{stem}.yaml"
    shipped = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    what = f"{name} is a directory" if str(name) and path.is_dir() else f"no config at {str(name)!r}"
    raise UserError(f"{what}; give a YAML file or a shipped recipe: {', '.join(shipped) or 'none found'}")


def load_section(
    kind: type[_SectionT], source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> _SectionT:
    """Parse a recipe of any kind; see `vggrpo.config.load_config`."""
    values = dict(source) if isinstance(source, Mapping) else _read_yaml(recipe_path(source))
    for override in overrides:
        values = _override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        command = _command_of(values, kind)
        if command:
            what = "these settings are" if isinstance(source, Mapping) else f"{source} is"
            raise UserError(
                f"{what} a recipe of `vggrpo {command}`; use that command, or name another recipe"
            ) from error
        raise UserError(_explain(error, kind)) from error


def _command_of(values: Mapping[str, Any], kind: type[BaseModel]) -> str | None:
    """The command whose recipes have all of these sections, if `kind` is not its and lacks some."""
    from vggrpo.config import TrainConfig
    from vggrpo.config_benchmark import BenchmarkConfig
    from vggrpo.config_lgm import TrainLGMConfig

    kinds: dict[str, type[BaseModel]] = {
        "train": TrainConfig,
        "train-lgm": TrainLGMConfig,
        "benchmark": BenchmarkConfig,
    }
    if values.keys() <= kind.model_fields.keys():
        return None
    return next((name for name, other in kinds.items() if values.keys() <= other.model_fields.keys()), None)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not readable YAML: {_problem(error)}; mend it there") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected keys and values such as `updates: 100`")
    return values


def _problem(error: Exception) -> str:
    """What a YAML file suffers from and where, on one line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {problem}" if problem and mark else " ".join(str(error).split())[:200]


def _override(values: Mapping[str, Any], override: str) -> dict[str, Any]:
    """A copy of `values` with one dotted `key=value` set."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{override!r} is no override; write key=value, such as grpo.kl=0.01")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value of {override!r} is not YAML; quote it") from error
    return _set(values, key.strip().split("."), value)


def _set(values: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    copy = dict(values)
    if len(keys) == 1:
        copy[keys[0]] = value
        return copy
    inner = copy.get(keys[0])
    if isinstance(inner, int | float) and keys[1] == "options":  # of a reward that is written `name: weight`
        inner = {"weight": inner}
    copy[keys[0]] = _set(inner if isinstance(inner, Mapping) else {}, keys[1:], value)
    return copy


def first_difference(saved: Mapping[str, Any], current: Section, may_change: Collection[str]) -> str | None:
    """The first field of a run's saved config that is another one now, as "name: was X, is Y"; None if there is none.

    A field that the run's version did not have yet means its default.

    Args:
        saved: plain values, as they were written.
        may_change: dotted names that do not count.
    """
    with suppress(ValidationError):  # what is no longer valid differs
        saved = type(current).model_validate(saved).model_dump(mode="json")
    before, now = flatten_config(saved), flatten_config(current.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        if key not in may_change and before.get(key) != now.get(key):
            return f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
    return None


def flatten_config(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of nested values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(flatten_config(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value})
    return flat


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(kind)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0) or ["updates"]
        same_leaf = [key for key in known if key.split(".")[-1] == str(first["loc"][-1])]
        return f"unknown config key {name!r}; the nearest known key is {(same_leaf or near)[0]!r}"
    message = first["msg"].removeprefix("Value error, ")
    message = re.sub(r"a valid dictionary or instance of \w+", "a section of keys and values", message)
    return (
        f"config: {message}"
        if not name
        else f"config key {name!r} is {first['input']!r}: {message[0].lower()}{message[1:]}"
    )


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += _known_keys(info.annotation, f"{prefix}{name}.")
    return keys
