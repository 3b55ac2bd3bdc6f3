"""Weights of the public VGGT (`facebook/VGGT-1B`, `facebook/VGGT-1B-Commercial`) for our `VGGT`.

Three renamings: the trunk's prefix `aggregator.` falls away, its `patch_embed` is our `stem`, and its camera and
register tokens are one parameter here. The tracker is left out, and so is the head of world points unless it is asked
for (`points: head`).
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor

_TRUNK, _STEM, _TRACKER, _POINTS = "aggregator.", "aggregator.patch_embed.", "track_head.", "point_head."
_SPECIAL = ("aggregator.camera_token", "aggregator.register_token")
# The full model has 24 pairs and reads these; smaller ones read at the same shares of their depth.
_PAIRS, _HOOKS = 24, (5, 12, 18, 24)


def is_official(state: dict[str, Tensor]) -> bool:
    """Whether the names are those of the public checkpoints."""
    return _SPECIAL[0] in state


def official_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Values of `VGGTConfig`, read off the shapes of public weights.

    Raises:
        ValueError: when a weight that tells a size is missing.
    """
    try:
        dim = state[_SPECIAL[0]].shape[-1]
        pairs = _count(state, "aggregator.frame_blocks.")
        return {
            "dim": dim,
            "heads": dim // len(state["aggregator.frame_blocks.0.attn.q_norm.weight"]),
            "conv_layers": 0,
            "pairs": pairs,
            "registers": state[_SPECIAL[1]].shape[2],
            "patch_embed": "dinov2",
            "encoder_layers": _count(state, _STEM + "blocks."),
            "position_grid": isqrt(state[_STEM + "pos_embed"].shape[1] - 1),
            "patch": state[_STEM + "patch_embed.proj.weight"].shape[-1],
            "mlp_ratio": state["aggregator.frame_blocks.0.mlp.fc1.weight"].shape[0] / dim,
            "decoder": "dpt",
            "head_features": len(state["depth_head.scratch.layer1_rn.weight"]),
            "head_widths": tuple(len(state[f"depth_head.projects.{level}.weight"]) for level in range(4)),
            "hooks": tuple(round(pairs * hook / _PAIRS) for hook in _HOOKS),
            "frame_stride": 1,
        }
    except KeyError as error:
        raise ValueError(f"the weights of VGGT lack {error.args[0]}") from error


def official_state(state: dict[str, Tensor], point_head: bool) -> dict[str, Tensor]:
    """Public weights under our names."""
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _SPECIAL or name.startswith(_TRACKER) or (name.startswith(_POINTS) and not point_head):
            continue
        if name.startswith(_STEM):
            name = "stem." + name.removeprefix(_STEM)
        ours[name.removeprefix(_TRUNK)] = value
    ours["special"] = torch.cat([state[name][0] for name in _SPECIAL], 1)  # (2, 1 + registers, D)
    return ours


def _count(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(
        (int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)), default=-1
    )
