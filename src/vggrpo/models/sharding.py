"""Weights split over processes (FSDP2): each block's parameters are gathered for its own forward and backward only.

A LoRA stays whole on every process (it is small, and its gradient is summed as without sharding), so its file, its
checkpoint and its optimizer are the same with and without; only the frozen weights are split. With full fine-tuning all
parameters are split, and FSDP sums their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vggrpo.errors import UserError


def shard_transformer(transformer: nn.Module, whole: Iterable[nn.Parameter]) -> None:
    """Split the parameters of `transformer` over all processes, block by block, but for those in `whole`.

    All processes must then call it equally often. FSDP gives a split parameter the **mean** gradient over processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(transformer.parameters()).device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    # A frozen weight that is gathered anew in the backward pass costs traffic, a kept one costs what sharding saves.
    options = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": set(whole)}
    for module in [*repeated_blocks(transformer), transformer]:
        fully_shard(module, **options)


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks that a diffusers transformer is a stack of: what is split, and compiled, one by one.

    Raises:
        UserError: when its class does not name them, as those of diffusers' video models do.
    """
    names = set(getattr(transformer, "_repeated_blocks", ()))
    blocks = [module for module in transformer.modules() if type(module).__name__ in names]
    if not blocks:
        raise UserError(
            f"{type(transformer).__name__} does not name its blocks (_repeated_blocks); set model.shard: false and "
            "model.compile: false"
        )
    return blocks


def is_split(tensor: Tensor) -> bool:
    """Whether this process holds a part of `tensor` only."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, the same memory; the tensor itself where it is whole."""
    return tensor.detach().to_local() if is_split(tensor) else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """The tensor in one piece; all processes must ask for it."""
    return tensor.detach().full_tensor() if is_split(tensor) else tensor.detach()


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor (the same on all processes) laid out as `like`."""
    if not is_split(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
