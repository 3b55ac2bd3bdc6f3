"""The policy: which parameters are trained, their optimizer, and the model that they started from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vggrpo.config import TrainConfig
from vggrpo.distributed import Processes
from vggrpo.errors import UserError
from vggrpo.models.base import VideoModel
from vggrpo.models.lora import attach_lora, export_lora, lora_disabled, lora_state, set_lora_state
from vggrpo.sampling.seeds import derive_seed


class Policy:
    """The LoRA on a video model's network, and AdamW."""

    def __init__(self, config: TrainConfig, model: VideoModel, processes: Processes) -> None:
        self.config, self.model, self.processes = config, model, processes
        lora, optim = config.lora, config.optim
        self.parameters: list[nn.Parameter] = attach_lora(
            model.transformer,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            seed=derive_seed(config.seed, "lora"),
        )
        if config.model.gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
        )

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the one that training started from."""
        with lora_disabled(self.model.transformer):
            yield

    def step(
        self,
        number: int,
        *,
        loss: float | torch.Tensor = 0.0,
        reproduction: Callable[[], Mapping[str, Any]] = dict,
    ) -> float:
        """Sum gradients over processes, clip, check, step.

        Args:
            number: of the update.
            loss: anything that must be finite beside the gradients.
            reproduction: what the file of a stopped run holds beside config and weights.

        Returns:
            The gradient's norm before it was clipped.

        Raises:
            UserError: when loss or gradients are not finite on any process; no parameter was changed.
        """
        self.processes.sum_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip)
        finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(torch.as_tensor(loss)).all())
        if self.processes.any(not finite, self.model.device):
            self._stop_on_non_finite(number, reproduction())
        rate = self.config.optim.learning_rate * min(1.0, (number + 1) / max(1, self.config.optim.warmup_updates))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.discard_gradients()
        return float(norm)

    def discard_gradients(self) -> None:
        """Forget what was accumulated."""
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"adapter": lora_state(self.model.transformer), "optimizer": self.optimizer.state_dict()}

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Put back what `tensors` gave."""
        set_lora_state(self.model.transformer, tensors["adapter"])
        self.optimizer.load_state_dict(tensors["optimizer"])

    def export(self, output: Path) -> Path:
        """The result as diffusers loads it, in its directory under `output`."""
        export_lora(self.model.transformer, self.exported(output))
        return self.exported(output)

    def exported(self, output: Path) -> Path:
        """Where `export` writes."""
        return output / "lora"

    def _stop_on_non_finite(self, number: int, reproduction: Mapping[str, Any]) -> None:
        """Keep what reproduces the update (its seeds follow from its number), and stop before the weights are
        spoilt."""
        file = Path(self.config.output) / f"nonfinite-{number:06d}-rank{self.processes.rank}.pt"
        torch.save(
            {
                "update": number,
                "adapter": lora_state(self.model.transformer),
                "config": self.config.model_dump(mode="json"),
                **reproduction,
            },
            file,
        )
        raise UserError(
            f"loss or gradient is not finite in update {number}; nothing was changed and {file} reproduces it: "
            "lower optim.learning_rate or set model.dtype: float32, and run again to resume"
        )
