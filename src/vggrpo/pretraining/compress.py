"""A LoRA at another rank: lower by the best approximation of each product B A, or higher by rows that do nothing yet.

Training at a high rank finds its way more easily; what it found needs far fewer numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compress_lora(state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors of a LoRA (peft's names, linear layers and convolutions) at rank `rank`; others as they are.

    The scale alpha / rank must stay what it was. A layer of fewer outputs than `rank` is filled with zeros.
    """
    out = dict(state)
    for name, first in state.items():
        if "lora_A" not in name:
            continue
        other = name.replace("lora_A", "lora_B")
        a, b = first.float().flatten(1), state[other].float().flatten(1)  # (r, in), (out, r)
        q_out, r_out = torch.linalg.qr(b)
        q_in, r_in = torch.linalg.qr(a.T)
        u, s, v = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
        root = s[:rank].sqrt()
        low_b, low_a = q_out @ u[:, :rank] * root, root[:, None] * (v[:rank] @ q_in.T)
        missing = rank - len(root)
        low_b = torch.cat([low_b, low_b.new_zeros(len(low_b), missing)], 1)
        low_a = torch.cat([low_a, low_a.new_zeros(missing, low_a.shape[1])])
        out[name] = low_a.view(rank, *first.shape[1:])
        out[other] = low_b.view(len(low_b), rank, *state[other].shape[2:])
    return out


def widen_lora(state: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a LoRA at the higher rank of `fresh`, a LoRA just added (its B zero): the same function.

    The scale alpha / rank must stay what it was. What `state` does not hold stays as in `fresh`.
    """
    out = dict(fresh)
    for name, value in state.items():
        wide = fresh[name].clone()
        wide[tuple(slice(n) for n in value.shape)] = value.to(wide.dtype)
        out[name] = wide
    return out
