"""What an algorithm is, and which there are. A new one is one file here and one line in `ALGORITHMS`.

    class MyAlgorithm:                                  # satisfies `Algorithm`
        needs_lgm = False                               # True: `context.lgm` is the geometry reader, else None
        def __init__(self, context: Context) -> None: ...
        def update(self, number, watch): ...            # number: 0 is the first; returns the metrics of the log line
        def state(self): ...                            # JSON that a checkpoint must hold beside weights and optimizer
        def load_state(self, state): ...                # called once, before the first update of a resumed run

The trainer does the rest: config, processes, resume, signals, log, checkpoints, validation, export. In `update`, an
algorithm calls the network through `context.model.predict_velocity` with `context.conditions.text(prompts, device)`
(text encoder and VAE may be gone), gets the model that it started from inside `with
context.policy.reference():`, accumulates gradients with `(loss / N).backward()`, N counting the samples of **all**
processes, and ends each optimizer step with `norm = context.policy.step(number, loss=...)`, which sums the gradients
over the processes, clips them, refuses non-finite ones, warms up and steps. All of an update's randomness must come
from `derive_seed(config.seed, name, number, ...)`, so that a resumed run is the run that was not interrupted; all
processes must make the same number of `step` calls (with `model.shard` also of network calls, see `policy.sharded`)
and share work by `context.processes.share`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Protocol

from vggrpo.config import TrainConfig
from vggrpo.distributed import Processes
from vggrpo.models.base import VideoModel
from vggrpo.posttraining.conditions import Conditions
from vggrpo.posttraining.policy import Policy
from vggrpo.posttraining.scoring import GeometryReader
from vggrpo.tracking import Stopwatch

ALGORITHMS: Mapping[str, str] = {
    "grpo": "vggrpo.posttraining.grpo:GRPO",
    "sft": "vggrpo.posttraining.sft:SFT",
    "dpo": "vggrpo.posttraining.dpo:DPO",
    "direct": "vggrpo.posttraining.direct:Direct",
    "nft": "vggrpo.posttraining.nft:NFT",
}
"""Name -> class; the config's field `algorithm` allows the same names."""


@dataclass(frozen=True)
class Context:
    """What an algorithm works with.

    Attributes:
        config: of the run.
        model: the video model; its network is the policy.
        policy: the trainable parameters, their optimizer, and the reference.
        lgm: latents -> geometry, frozen; None where the algorithm asks for none.
        prompts: the training prompts.
        conditions: their text embeddings and first frames.
        processes: this process among all.
        stop: set when the run should end; who works for minutes within an update looks at it.
    """

    config: TrainConfig
    model: VideoModel
    policy: Policy
    lgm: GeometryReader | None
    prompts: Sequence[str]
    conditions: Conditions
    processes: Processes
    stop: threading.Event = field(default_factory=threading.Event)


class Algorithm(Protocol):
    """One way to tune a video model; see the module."""

    needs_lgm: ClassVar[bool]

    def __init__(self, context: Context) -> None: ...

    def update(self, number: int, watch: Stopwatch) -> dict[str, float]:
        """Do update `number` and return its metrics; all processes return the same."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside weights and optimizer (JSON)."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        ...


def find_algorithm(name: str) -> type[Algorithm]:
    """The class behind `algorithm: NAME`; the config has checked the name."""
    module, _, attribute = ALGORITHMS[name].partition(":")
    return getattr(import_module(module), attribute)
