"""What several processes need to agree on: who they are, all their rewards, and the sum of their gradients.

Data parallel without a wrapper: each process rolls out its share of the samples, group statistics are computed from the
gathered rewards (so they do not depend on the split), each scales its loss by the **global** number of transitions, and
gradients are summed. One process needs none of it and every function is then the identity. A process that dies ends all
others with one line. Asked to stop, all stop after the same update (`stop_signals`, `Processes.any`).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.errors import UserError

logger = logging.getLogger(__name__)
BUCKET = 1 << 26
"""Gradient values that are summed in one message."""


@dataclass(frozen=True)
class Processes:
    """This process among all of the job.

    Attributes:
        rank: this process, 0 to size - 1; 0 writes files.
        size: number of processes.
        local_rank: this process on its machine, which picks the GPU.
        even: refuse shares of unequal size; with split weights a process with less work would leave the others waiting.
        meeting: where `barrier` waits; None: where everything else is exchanged, for `join`'s time.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    even: bool = False
    meeting: torch.distributed.ProcessGroup | None = None

    @classmethod
    def join(cls, timeout_minutes: float = 30.0) -> Processes:
        """Join the job that torchrun, accelerate or mpirun announced in the environment, or be alone.

        Args:
            timeout_minutes: how long a process waits for another one before the job ends with an error.

        Raises:
            UserError: see `announced`; or when the others cannot be reached.
        """
        rank, size, local_rank = announced(os.environ)
        if size == 1:
            return cls()
        if not torch.distributed.is_initialized():
            if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
                raise UserError("several processes need MASTER_ADDR and MASTER_PORT, where they meet; set both")
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}  # where torch looks
            if torch.cuda.is_available():
                torch.cuda.set_device(local_rank)
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            with _together():
                torch.distributed.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
        return cls(torch.distributed.get_rank(), size, local_rank)

    def patient(self) -> Processes:
        """The same processes, but `barrier` waits for days: for stages in which one may work for hours alone.

        All processes call it together. One that dies still ends the others at once, its connections close.
        """
        if self.size == 1:
            return self
        with _together():
            return replace(self, meeting=torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7)))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's contiguous part of `count` samples; the first ones take one more where it does not divide.

        Raises:
            UserError: when a process would have none, or another number than others where they must be `even`.
        """
        if count < self.size:
            raise UserError(
                f"{count} samples per update cannot be shared by {self.size} processes; raise "
                f"grpo.prompts_per_update or grpo.samples_per_prompt, or start {count} processes"
            )
        part, more = divmod(count, self.size)
        if self.even and more:
            raise UserError(
                f"model.shard needs equal shares, and {count} samples per update are none of {self.size}; make them "
                f"(grpo.prompts_per_update x grpo.samples_per_prompt) a multiple of {self.size}"
            )
        start = self.rank * part + min(self.rank, more)
        return slice(start, start + part + (self.rank < more))

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate the last dimension over all processes, in their order; each may bring another length."""
        if self.size == 1:
            return values
        moved = values.movedim(-1, 0).contiguous()
        with _together():
            length = torch.tensor([len(moved)], device=moved.device)
            lengths = [torch.empty_like(length) for _ in range(self.size)]
            torch.distributed.all_gather(lengths, length)
            longest = int(torch.stack(lengths).max())
            padded = torch.cat([moved, moved.new_zeros(longest - len(moved), *moved.shape[1:])])
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            torch.distributed.all_gather(parts, padded)
        return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)]).movedim(0, -1)

    def sum(self, values: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Sum over all processes."""
        if self.size > 1:
            with _together():
                torch.distributed.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over all processes in few messages, so that every process takes the same optimizer step."""
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in bucket])
            self.sum(flat)
            for parameter, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = gradient.view_as(parameter).clone()

    def any(self, flag: bool, device: torch.device) -> bool:
        """True on all processes if it is on one."""
        return bool(self.sum(torch.tensor(float(flag), device=device)) > 0) if self.size > 1 else flag

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return number
        return int(self.gather(torch.tensor([number], device=device)).max())

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            with _together():
                torch.distributed.barrier(group=self.meeting)


_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun and accelerate
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun of Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # mpirun of MPICH and Intel MPI
)


def announced(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, size, local rank) that a launcher put into the environment; (0, 1, 0) without one.

    Raises:
        UserError: when several processes were asked for and a single one was started. `accelerate launch --cpu
            --num_processes 2` does that: it leaves the processes to mpirun, and starts one where no hostfile is named.
    """
    for rank, size, local in _LAUNCHERS:
        if environment.get(size, "1") != "1" and rank not in environment:
            raise UserError(
                f"{size} is set to {environment[size]} and {rank} is not; start the processes with torchrun"
            )
        if size in environment and rank in environment:
            return int(environment[rank]), int(environment[size]), int(environment.get(local, "0"))
    # accelerate names a meeting point only when several processes are to meet.
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment:
        raise UserError(
            "accelerate was asked for several processes and started one, as it does with --cpu and without "
            "--mpirun_hostfile; on CPUs start them with torchrun --nproc-per-node N -m vggrpo.cli ..."
        )
    return 0, 1, 0


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@contextmanager
def _together() -> Iterator[None]:
    """Communication fails when another process is gone; the user is told so."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"lost contact with another process ({reason}); see its own message, and run again to go on from the "
            "last checkpoint"
        ) from error


@contextmanager
def stop_signals(event: threading.Event | None = None) -> Iterator[threading.Event]:
    """An event (a new one, or the one given) that SIGINT and SIGTERM set; a second SIGINT interrupts at once. Outside
    of the main thread nothing is caught."""
    event = event or threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.warning("stopping after this update, or this prompt's clips; the run can be resumed")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
