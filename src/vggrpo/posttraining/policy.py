"""The policy: which parameters are trained, their optimizer and average, and the model that they started from.

`model.tune: lora` trains an adapter, and the reference is the same network with the adapter switched off. `full` trains
every weight (float32, the network itself under autocast), and the reference is a copy of the first weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggrpo.config import TrainConfig
from vggrpo.distributed import Processes
from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_path, atomic_write_json
from vggrpo.models.base import VideoModel
from vggrpo.models.lora import FULL_WEIGHTS_NAME, attach_lora, export_lora, lora_disabled, lora_parameters
from vggrpo.models.sharding import is_split, local_part, repeated_blocks, shard_transformer, split_like, whole
from vggrpo.sampling.seeds import derive_seed


class NonFiniteError(Exception):
    """Loss or gradient is NaN or infinite on some process."""


class Policy:
    """What is trained of a video model's network, and AdamW."""

    def __init__(self, config: TrainConfig, model: VideoModel, processes: Processes) -> None:
        self.config, self.model, self.processes = config, model, processes
        self.full = config.model.tune == "full"
        transformer, lora, optim = model.transformer, config.lora, config.optim
        if self.full:
            transformer.float().requires_grad_(True)
            model.autocast = torch.bfloat16 if config.model.dtype == "bfloat16" else None
        else:
            seed = derive_seed(config.seed, "lora")
            attach_lora(transformer, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed)
        if config.model.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if config.model.compile:
            for block in repeated_blocks(transformer):
                block.compile()
        if config.model.shard:
            if processes.size == 1:
                raise UserError(
                    "model.shard splits the weights over processes, and there is one; start several with "
                    "torchrun or accelerate launch, or set model.shard: false"
                )
            shard_transformer(transformer, () if self.full else [p for _, p in lora_parameters(transformer)])
        named = transformer.named_parameters() if self.full else lora_parameters(transformer)
        self.named: dict[str, nn.Parameter] = dict(sorted(named))
        self.parameters = list(self.named.values())
        self.sharded = config.model.shard
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
        )
        self._initial = self._copies() if self.full else []
        self._average = self._copies() if optim.ema is not None else []

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the one that training started from. Never enter between a forward and its backward."""
        with self._swapped(self._initial) if self.full else lora_disabled(self.model.transformer):
            yield

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their moving average, if `optim.ema` asks for one: what is validated and exported."""
        with self._swapped(self._average):
            yield

    def step(self, number: int, *, loss: float | Tensor = 0.0) -> float:
        """Sum gradients over processes, clip, check, step.

        Args:
            number: of the update.
            loss: anything that must be finite beside the gradients.

        Returns:
            The gradient's norm before it was clipped.

        Raises:
            NonFiniteError: when loss or gradients are not finite on any process; no parameter was changed.
        """
        self._sum_gradients()
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip))
        finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(torch.as_tensor(loss)).all())
        if self.processes.any(not finite, self.model.device):
            raise NonFiniteError
        rate = self.config.optim.learning_rate * min(1.0, (number + 1) / max(1, self.config.optim.warmup_updates))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.discard_gradients()
        for average, parameter in zip(self._average, self.parameters, strict=False):
            average.lerp_(local_part(parameter), 1 - float(self.config.optim.ema or 0))
        return float(norm)

    def _sum_gradients(self) -> None:
        """Over all processes; FSDP has averaged those of split parameters already."""
        self.processes.sum_gradients([p for p in self.parameters if not is_split(p)])
        for parameter in self.parameters:
            if is_split(parameter) and parameter.grad is not None:
                parameter.grad.mul_(self.processes.size)

    def discard_gradients(self) -> None:
        """Forget what was accumulated."""
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint must hold, on the CPU; all processes must ask for it."""
        state = self.optimizer.state_dict()
        moments = {
            index: {name: _saved(value) for name, value in values.items()} for index, values in state["state"].items()
        }
        return {
            "adapter": {name: _saved(parameter) for name, parameter in self.named.items()},
            "optimizer": {**state, "state": moments},
            "average": [_saved(self._laid_out(a, p)) for a, p in zip(self._average, self.parameters, strict=False)],
        }

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Put back what `tensors` gave."""
        if tensors["adapter"].keys() != self.named.keys():
            raise UserError(
                "the saved weights belong to another model or to other lora.targets; use another output directory"
            )
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(split_like(tensors["adapter"][name], parameter))
            for average, saved, parameter in zip(self._average, tensors["average"], self.parameters, strict=False):
                average.copy_(local_part(split_like(saved, parameter)))
        moments = {
            index: {
                name: split_like(value, self.parameters[index]) if value.ndim else value
                for name, value in values.items()
            }
            for index, values in tensors["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**tensors["optimizer"], "state": moments})

    def export(self, output: Path) -> Path:
        """The result as diffusers loads it, in its directory under `output`; all processes must ask for it."""
        directory = exported(self.config, output)
        with self.averaged():
            if not self.full:
                if self.processes.is_main:
                    export_lora(self.model.transformer, directory, self.model.pipeline)
            else:
                state = {name: _saved(parameter) for name, parameter in self.named.items()}
                if self.processes.is_main:
                    _export_transformer(self.model.transformer, state, directory)
        return directory

    def _copies(self) -> list[Tensor]:
        return [local_part(parameter).clone() for parameter in self.parameters]

    def _laid_out(self, local: Tensor, like: nn.Parameter) -> Tensor:
        """A copy of `like` with the values `local` on this process."""
        if not is_split(like):
            return local
        tensor = like.detach().clone()
        local_part(tensor).copy_(local)
        return tensor

    @contextmanager
    def _swapped(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the parameters hold `values`; nothing happens when there are none."""
        if not values:
            yield
            return
        kept = self._copies()
        try:
            self._fill(values)
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            local_part(parameter).copy_(value)


def exported(config: TrainConfig, output: Path) -> Path:
    """Where the result of a run lies."""
    return output / ("transformer" if config.model.tune == "full" else "lora")


def class_name(transformer: nn.Module) -> str:
    """Name of a network's class as diffusers knows it; FSDP puts its own in front."""
    return type(transformer).__name__.removeprefix("FSDP")


def _saved(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in one piece."""
    return whole(tensor).cpu().clone()


def _export_transformer(transformer: nn.Module, state: Mapping[str, Tensor], directory: Path) -> None:
    """`from_pretrained(directory)` of the transformer's class reads it."""
    from safetensors.torch import save_file

    with atomic_path(directory / FULL_WEIGHTS_NAME) as temporary:
        save_file({name: value.contiguous() for name, value in state.items()}, str(temporary))
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_name")}
    atomic_write_json(directory / "config.json", {**config, "_class_name": class_name(transformer)})
