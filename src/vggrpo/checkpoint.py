"""Checkpoints that are whole or absent, and a resume that falls back when the last one is damaged.

A checkpoint is a directory `step-000010` with `tensors.pt` (adapter, optimizer, random states), `state.json` (step,
config, counters, versions) and `checksums.json` (SHA-256 of both). It is written beside its place and renamed into it,
so a crash or a full disk leaves the older ones intact.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.io.atomic import ensure_directory

logger = logging.getLogger(__name__)
_FILES = ("tensors.pt", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved.

    Attributes:
        step: updates done.
        tensors: nested dicts and lists of tensors and numbers.
        state: JSON values.
        path: its directory.
    """

    step: int
    tensors: dict[str, Any]
    state: dict[str, Any]
    path: Path


def save_checkpoint(
    directory: Path | str, step: int, tensors: dict[str, Any], state: dict[str, Any], *, keep_last: int = 2
) -> Path:
    """Write one checkpoint atomically, then delete all but the newest `keep_last`.

    Raises:
        UserError: when the disk is full or not writable; nothing older is touched.
    """
    root = ensure_directory(directory)
    temporary = root / f".step-{step:06d}.{uuid.uuid4().hex[:12]}.partial"
    target = root / f"step-{step:06d}"
    try:
        temporary.mkdir()
        torch.save(tensors, temporary / _FILES[0])
        (temporary / _FILES[1]).write_text(json.dumps({**state, "step": step}, indent=1), encoding="utf-8")
        sums = {name: _sha256(temporary / name) for name in _FILES}
        (temporary / "checksums.json").write_text(json.dumps(sums, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            _sync(file)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(root)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise UserError(
            f"checkpoint {target} could not be written ({error}); free space there, older checkpoints are intact"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _list(root)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_latest(directory: Path | str) -> Checkpoint | None:
    """The newest whole checkpoint, or None if there is none at all. A damaged one is passed over with a warning.

    Raises:
        UserError: when there are checkpoints but none is whole: starting afresh in silence would lose the run.
    """
    found = _list(Path(directory))
    for path in reversed(found):
        reason = _damage(path)
        if reason is None:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            tensors = torch.load(path / "tensors.pt", map_location="cpu", weights_only=True)
            return Checkpoint(state["step"], tensors, state, path)
        logger.warning("checkpoint %s is damaged (%s); falling back to the one before", path, reason)
    if found:
        raise UserError(
            f"all {len(found)} checkpoints in {directory} are damaged; delete the directory to start afresh"
        )
    return None


def seed_generators(seed: int) -> None:
    """Start torch's, NumPy's and Python's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Of this process's generators: torch's on the CPU and on `device`, NumPy's and Python's global ones (a reward may
    draw from any). Each is one tensor, of a length that all processes share."""
    _, words, place, pending, spare = np.random.get_state()
    _, integers, other_spare = random.getstate()
    states = {
        "cpu": torch.get_rng_state(),
        "numpy": _packed([*words.tolist(), place, pending], spare),
        "python": _packed(integers, math.nan if other_spare is None else other_spare),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `random_states` gave; a generator that an older checkpoint does not hold is left as it is."""
    torch.set_rng_state(states["cpu"])
    if "numpy" in states:
        (*words, place, pending), spare = _unpacked(states["numpy"])
        np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), place, pending, spare))
    if "python" in states:
        integers, spare = _unpacked(states["python"])
        random.setstate((random.getstate()[0], tuple(integers), None if math.isnan(spare) else spare))
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _packed(integers: Sequence[int], number: float) -> Tensor:
    """Integers and the bits of a float64, as int64."""
    bits = torch.tensor([number], dtype=torch.float64).view(torch.int64)
    return torch.cat([torch.tensor(integers, dtype=torch.int64), bits])


def _unpacked(packed: Tensor) -> tuple[list[int], float]:
    return packed[:-1].tolist(), float(packed[-1:].view(torch.float64))


def _list(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def _damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        for name in _FILES:
            if _sha256(path / name) != sums[name]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or directory to disk, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # Windows cannot open directories
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
