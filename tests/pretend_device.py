"""A GPU for machines without one: tensors that say they are on `cuda:0`, with their numbers in the host's memory.

What a GPU refuses is refused here: an operation on tensors of both places, `numpy()` of one that is not on the CPU. All
else gives the CPU's own numbers, so a training step, its backward pass included, can be compared with the CPU's. What
this can't show: a GPU's kernels, their rounding, its streams, and autocast, which torch switches off without CUDA.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
# What torch itself sees: of the devices that every build knows, the one that nothing else here uses.
_INSIDE = torch.device("meta")
_MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_")


class DeviceTensor(Tensor):
    """A tensor on the pretended device."""

    host: Tensor
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, device=_INSIDE
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy: Tensor = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            copy = nn.Parameter(copy.detach(), self.requires_grad)
        memo[id(self)] = copy
        return copy

    def tolist(self) -> Any:
        return self.host.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.host})"


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Inside, tensors can be made on and moved to the device that this gives."""
    with warnings.catch_warnings(), _Names(), _Places():
        warnings.filterwarnings("ignore", ".*Disabling autocast")
        yield DEVICE


class _Names(TorchFunctionMode):
    """Asks torch for the device that it knows in place of the pretended one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # torch fills these where no mode sees it: filled here, moved then.
        if func is Tensor.new_tensor and isinstance(args[0], DeviceTensor):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs).to(_INSIDE)
        if func in (torch.tensor, torch.as_tensor) and _is_device(kwargs.get("device")):
            return func(*args, **kwargs | {"device": "cpu"}).to(_INSIDE)
        if func is Tensor.__getitem__ and isinstance(args[0], DeviceTensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return func(args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in index))
        args, kwargs = tree_map(lambda x: _INSIDE if _is_device(x) else x, (args, kwargs))
        return func(*args, **kwargs)


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device | str) and str(value) in ("cuda", "cuda:0")


class _Places(TorchDispatchMode):
    """Catches what makes tensors from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, DeviceTensor)]
    here = [x for x in tensors if not isinstance(x, DeviceTensor)]
    name = func._schema.name
    assert not any(x.device == _INSIDE for x in here), f"{name}: a tensor without numbers, filled where no mode sees it"
    if there and here and name not in _MAY_MIX and (name == "aten::cat" or any(x.ndim for x in here)):
        raise RuntimeError(f"{name}: tensors on {DEVICE} and on the cpu, {[tuple(x.shape) for x in here]}")
    if here and there and name.startswith("aten::index") and not isinstance(args[0], DeviceTensor):
        raise RuntimeError(f"{name}: a tensor on the cpu, its index on {DEVICE}")
    asked = kwargs.get("device")
    wrap = bool(there) if asked is None else asked == _INSIDE
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(lambda x: x.host if isinstance(x, DeviceTensor) else x, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    written = _written(func, args, kwargs)
    if written is not None:
        return written
    return tree_map(lambda x: DeviceTensor(x) if wrap and isinstance(x, Tensor) else x, out)


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operation in place gives back: the very tensor that it was given."""
    returns = func._schema.returns
    if not returns or returns[0].alias_info is None or not returns[0].alias_info.is_write:
        return None
    given = [
        (spec, args[i] if i < len(args) else kwargs.get(spec.name)) for i, spec in enumerate(func._schema.arguments)
    ]
    out = [value for spec, value in given if spec.alias_info is not None and spec.alias_info.is_write]
    return out[0] if len(returns) == 1 else tuple(out)
