"""One process of a training run, for tests that start several or kill them.

Its settings: {"pipeline", "output", "overrides", "changes", "algorithm", "record", "kill"}. "algorithm": one of the
rivals instead of GRPO ("changes" are GRPO's). With "record", the gradient of every
optimizer step (LoRA B redrawn at the start, so that none is zero) goes to that file, and all processes compare their
parameters after each step. "kill": {"rank", "where", "number"}: SIGKILL of that rank when `where` ("replay", "write",
"rename") happens for the number-th time.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path

import test_posttraining_rivals as rivals_test
import test_posttraining_trainer as trainer_test
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoTokenizer, UMT5EncoderModel

from vggrpo import checkpoint
from vggrpo.distributed import Processes
from vggrpo.errors import UserError
from vggrpo.models.sharding import whole
from vggrpo.posttraining.policy import Policy
from vggrpo.posttraining.replay import Replayer

# Imported by the server once, so that its forks need not.
PRELOADED = (
    AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel, LoraConfig, SummaryWriter,
    AutoTokenizer, UMT5EncoderModel,
)  # fmt: skip


def before(owner, name, number, action):
    """Do `action` when `owner.name` is called for the number-th time."""
    plain, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            action()
        return plain(*arguments, **options)

    setattr(owner, name, counted)


def record_gradients() -> list[Tensor]:
    """Redraw LoRA B in every new policy, note all gradients, and check that the processes agree."""
    kept: list[Tensor] = []
    start, step, clip = Policy.__init__, Policy.step, torch.nn.utils.clip_grad_norm_

    def begin(self, *arguments):
        start(self, *arguments)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named.items():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.1)

    def noted(parameters, limit):
        kept.append(torch.cat([whole(p.grad).flatten() for p in parameters]).clone())
        return clip(parameters, limit)

    def checked(self, *arguments, **options):
        norm = step(self, *arguments, **options)
        if self.processes.size > 1:
            mine = torch.cat([whole(p).flatten() for p in self.parameters])
            both = [torch.empty_like(mine) for _ in range(self.processes.size)]
            torch.distributed.all_gather(both, mine)
            assert all(torch.equal(each, mine) for each in both), "the processes drifted apart"
        return norm

    Policy.__init__, Policy.step, torch.nn.utils.clip_grad_norm_ = begin, checked, noted
    return kept


def arm(kill: dict) -> None:
    """Prepare the death of this process."""
    if int(os.environ.get("RANK", "0")) != kill["rank"]:
        return
    die = lambda: os.kill(os.getpid(), kill.get("signal", signal.SIGKILL))  # noqa: E731
    if kill["where"] == "replay":
        before(Replayer, "backward", kill["number"], die)
    if kill["where"] == "rename":
        replace = os.replace

        def unless_its_turn(source, target):
            if Path(target).name == f"step-{kill['number']:06d}":
                die()
            replace(source, target)

        checkpoint.os.replace = unless_its_turn
    if kill["where"] == "write":
        plain, calls = torch.save, []

        def half(tensors, path):
            calls.append(1)
            plain(tensors, path)
            if len(calls) == kill["number"]:
                content = Path(path).read_bytes()
                Path(path).write_bytes(content[: len(content) // 2])
                die()

        checkpoint.torch.save = half


def main(spec: dict) -> int:
    kept = record_gradients() if "record" in spec else []
    if "kill" in spec:
        arm(spec["kill"])
    try:
        if "algorithm" in spec:
            rivals_test.run(spec["algorithm"], spec["pipeline"], spec["output"], *spec.get("overrides", ()))
        else:
            trainer_test.train(spec["pipeline"], spec["output"], spec.get("overrides", ()), **spec.get("changes", {}))
    except UserError as error:
        print(f"vggrpo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(error, file=sys.stderr)
        return 130
    if "record" in spec and Processes.join().is_main:
        torch.save(kept, spec["record"])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def enter(spec: dict, environment: dict[str, str], errors: str) -> None:
    """What a new process does: standard error goes to a file, the exit code is main's."""
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    faulthandler.dump_traceback_later(400, exit=True)  # a process that hangs says where
    torch.set_num_threads(1)
    sys.exit(main(spec))
