"""Weights that hide nothing: every parameter of a network drawn anew, by a rule that depends on names and shapes alone.

Networks start with LayerScale near zero, unit norms and zero biases, so that a wrong attention or a missing norm would
hardly show. The rule lets a public implementation and ours hold the same weights without storing them.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def draw(name: str, shape: torch.Size, seed: int = 0) -> Tensor:
    """The weight called `name`: matrices and kernels keep the variance, factors lie around 1, all else around 0."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    value = torch.randn(shape, generator=generator)
    if name.endswith((".weight", ".gamma")):
        return 1 + 0.3 * value if value.ndim == 1 else value / value[0].numel() ** 0.5
    return 0.3 * value


@torch.no_grad()
def redraw(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Redraw all parameters in place; returns the state dict."""
    state = {name: draw(name, value.shape, seed) for name, value in network.state_dict().items()}
    network.load_state_dict(state)
    return state


def picture(*shape: int, seed: int = 1) -> Tensor:
    """Smooth and rough parts, values in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def shapes(state: dict[str, Tensor]) -> dict[str, int]:
    """A state dict's names and shapes with the numbers of blocks folded: `blocks.*.norm1.weight [32]` -> count."""
    folded: dict[str, int] = {}
    for name, value in state.items():
        key = f"{'.'.join('*' if part.isdigit() else part for part in name.split('.'))} {list(value.shape)}"
        folded[key] = folded.get(key, 0) + 1
    return folded


def golden(name: str) -> dict:
    """Numbers of a public implementation; `tests/golden/README.md` names it."""
    return json.loads((GOLDEN / name).read_text())


def sample(values: Tensor, count: int = 40) -> Tensor:
    """About `count` evenly spread entries, as they are stored in golden files."""
    flat = values.detach().flatten()
    return flat[:: max(1, len(flat) // count)][:count]


def unfolded(names: dict[str, list]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state dict, stored as name: [shape], or name with `blocks.*.`: [shape, [first, last]]."""
    state: dict[str, tuple[int, ...]] = {}
    for name, (shape, *span) in names.items():
        first, last = span[0] if span else (0, 0)
        for block in range(first, last + 1):
            state[name.replace("blocks.*.", f"blocks.{block}.")] = tuple(shape)
    return state
