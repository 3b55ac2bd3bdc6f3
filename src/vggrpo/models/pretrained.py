"""Reading `config.json` and weights from a directory: one way, and one line for all that can be wrong with it."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_path, atomic_write_json

WEIGHTS = ("model.safetensors", "model.pt", "model.pth", "pytorch_model.bin")
_SHOWN = 3
_Network = TypeVar("_Network", bound=nn.Module)


@contextmanager
def reading(what: str, source: str | Path, remedy: str) -> Iterator[None]:
    """Turn what goes wrong while `what` is read from `source` into a `UserError` of one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        name = Path(error.filename).name if error.filename else str(error)
        raise UserError(f"no {what} in {source}: {name} is missing; {remedy}") from error
    except Exception as error:
        raise UserError(f"the {what} in {source} cannot be read: {one_line(error)}; {remedy}") from error


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` may name a repository of the hub: `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source)) is not None


def read_config(directory: Path) -> dict[str, Any]:
    """The values of `config.json`."""
    values = json.loads((directory / "config.json").read_text())
    if not isinstance(values, dict):
        raise ValueError("config.json holds no object")
    return values


class _Inert:
    """What stands for every class or function of a checkpoint that is not torch's own: keeps nothing, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def read_weights(source: Path) -> dict[str, Tensor]:
    """Tensors of a weights file, or of the one that a directory holds; no code of the file or that it names is run."""
    if source.is_dir():
        found = [source / name for name in WEIGHTS if (source / name).is_file()]
        if not found:  # a single file of any name, as Any4D has
            found = [path for path in source.iterdir() if path.suffix in {Path(name).suffix for name in WEIGHTS[:3]}]
        if not found or (len(found) > 1 and found[0].name not in WEIGHTS):
            raise FileNotFoundError(2, "no weights", str(source / WEIGHTS[0]))
        source = found[0]
    if source.suffix == ".safetensors":
        return load_file(source)
    state = _unpickled(source)
    while isinstance(state, Mapping) and len(wrapped := [k for k in ("model", "state_dict") if k in state]) == 1:
        state = state[wrapped[0]]  # training checkpoints keep the weights beside the optimizer
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{source.name} holds something else than weights")
    return dict(state)


def _unpickled(source: Path) -> Any:
    """What a file of `torch.save` holds, with `_Inert` objects in the place of all that torch's safe reader refuses.

    Training checkpoints keep arguments or a config beside the weights (map-anything and its descendants an
    `argparse.Namespace` or an omegaconf). The names that the file asks for are listed without unpickling it, and the
    safe reader, which imports nothing, gets the stub under each. Tensors are mapped: those that nobody asks for, such
    as the optimizer's, are not read.

    Raises:
        UserError: the safe reader cannot make sense of it even so; says how to keep the weights alone.
    """
    archive = zipfile.is_zipfile(source)  # not so before torch 1.6: then nothing is listed or mapped
    try:
        names = get_unsafe_globals_in_checkpoint(source) if archive else []
        with safe_globals([(_Inert, name) for name in names]):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=archive)
    except (pickle.UnpicklingError, AttributeError, TypeError) as error:  # torch's own advice is to run what it holds
        raise UserError(
            f"{source} cannot be read: it is no weights file, or holds more than weights, in a way that only running "
            "its code would tell; copy it again, or, where you trust it, keep its weights alone: "
            f"`torch.save(torch.load('{source.name}', weights_only=False)['model'], 'weights.pt')`"
        ) from error


def build(make: Callable[[], _Network], state: dict[str, Tensor]) -> _Network:
    """A network with the weights `state` in float32, without drawing random ones first.

    Raises:
        ValueError: names or shapes that do not fit, in one line.
    """
    with torch.device("meta"):
        network = make()
    network.to_empty(device="cpu")
    fill(network, state)
    return network.requires_grad_(False).eval()


def fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict`, whose complaints are a wall of text, with one line instead: see `build`."""
    missing: list[str] = []
    try:
        missing, unexpected = network.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
        shapes: list[str] = []
    except RuntimeError as error:  # shapes; names are complained about only where shapes fit
        lines = str(error).splitlines()[1:]
        shapes, unexpected = [line.split("for ")[-1].split(":")[0] for line in lines], []
    require_names(missing, unexpected, shapes)


def require_names(missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str] = ()) -> None:
    """Raise a `ValueError` that counts and samples the names of weights that do not fit."""
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in (
            ("missing", list(missing)),
            ("unexpected", list(unexpected)),
            ("of another shape", list(shapes)),
        )
        if names
    ]
    if parts:
        raise ValueError(f"the weights do not fit the config: {', '.join(parts)}")


def write_pretrained(directory: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: Any) -> None:
    """Write `config.json` and `model.safetensors`, each whole or not at all."""
    atomic_write_json(Path(directory) / "config.json", dict(config))
    with atomic_path(Path(directory) / WEIGHTS[0]) as temporary:
        save_file({k: v.detach().to(dtype).contiguous() for k, v in state.items()}, temporary)


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Without its pages about weights that do not fit: the error that follows says it in one line."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def one_line(error: BaseException) -> str:
    """What an exception says, without the lines that it goes on for."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:_SHOWN])
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[1].strip() if text[0].endswith(":") and len(text) > 1 else text[0]
