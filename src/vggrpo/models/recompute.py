"""Activations made again in the backward pass: a deep network's training in the memory of one of its parts.

A network marks the parts that are worth it (transformer blocks, dense heads some views at a time) by running them
through `recomputed`; training switches them on with `set_recompute`. Nothing changes while a network is only used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def set_recompute(network: nn.Module, on: bool) -> None:
    """Switch every part of `network` that can (it has an attribute `recompute`)."""
    for module in network.modules():
        if hasattr(module, "recompute"):
            module.recompute = on  # type: ignore[assignment]


def recomputed(owner: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, of which only the inputs are kept where `owner.recompute` is set and `owner` is trained.

    The same numbers bit for bit, under autocast too: nothing here draws random numbers.
    """
    if owner.recompute and owner.training and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)
