"""What several processes need to agree on: who they are, all their rewards, and the sum of their gradients.

Data parallel without a wrapper: each process rolls out its share of the samples, group statistics are computed from the
gathered rewards
(so they do not depend on the split), each scales its loss by the **global** number of transitions, and gradients are
summed. One process
needs none of it and every function is then the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among all of the job.

    Attributes:
        rank: this process, 0 to size - 1; 0 writes files.
        size: number of processes.
        local_rank: this process on its machine, which picks the GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Processes:
        """Join the job that torchrun or accelerate announced in the environment, or be alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(torch.distributed.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's contiguous part of `count` samples.

        Raises:
            UserError: when they cannot be shared equally.
        """
        if count % self.size:
            raise UserError(
                f"{count} samples per update cannot be shared by {self.size} processes; "
                f"make grpo.prompts_per_update x grpo.samples_per_prompt a multiple of {self.size}"
            )
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate the last dimension over all processes, in their order."""
        if self.size == 1:
            return values
        moved = values.movedim(-1, 0).contiguous()
        parts = [torch.empty_like(moved) for _ in range(self.size)]
        torch.distributed.all_gather(parts, moved)
        return torch.cat(parts).movedim(0, -1)

    def sum(self, values: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Sum over all processes."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over all processes in one message, so that every process takes the same optimizer step."""
        if self.size == 1:
            return
        parameters = list(parameters)
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter).clone()

    def any(self, flag: bool, device: torch.device) -> bool:
        """True on all processes if it is on one."""
        return bool(self.sum(torch.tensor(float(flag), device=device)) > 0) if self.size > 1 else flag

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            torch.distributed.barrier()
