"""The trainer that the algorithms share: load, resume, loop, log, checkpoint, export.

A run is a directory. Running again goes on from its last whole checkpoint, bit for bit; SIGINT or SIGTERM saves at the
end of the update.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vggrpo import assets
from vggrpo.checkpoint import Checkpoint, load_latest, save_checkpoint
from vggrpo.config import EMBEDDED, TrainConfig, dump_config, resume_difference
from vggrpo.distributed import Processes
from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write, ensure_directory
from vggrpo.io.manifest import read_jsonl
from vggrpo.models.base import VideoModel
from vggrpo.models.loading import load_video_model
from vggrpo.posttraining.algorithm import Algorithm, Context, find_algorithm
from vggrpo.posttraining.card import lora_card
from vggrpo.posttraining.policy import Policy
from vggrpo.posttraining.scoring import GeometryReader, check_rewards
from vggrpo.sampling.seeds import derive_seed
from vggrpo.tracking import Stopwatch, Tracker

logger = logging.getLogger(__name__)
_PACKAGES = ("torch", "diffusers", "peft", "transformers")


def train(
    config: TrainConfig,
    *,
    model: VideoModel | None = None,
    lgm: GeometryReader | None = None,
    prompts: Sequence[str] | None = None,
    progress: bool = True,
) -> Path:
    """Tune a video model with `config.algorithm`; resumes by itself.

    Args:
        config: see `vggrpo.config.TrainConfig`.
        model: use this video model instead of loading `config.model.path`; it is changed.
        lgm: use this geometry reader instead of loading `config.lgm.path`.
        prompts: use these instead of `config.data.prompts`.
        progress: show a progress bar.

    Returns:
        The directory of the exported LoRA, OUTPUT/lora.

    Raises:
        UserError: for bad input; nothing of an earlier run is overwritten.
        KeyboardInterrupt: after SIGINT or SIGTERM, when the resumable state is saved.
    """
    algorithm = find_algorithm(config.algorithm)
    check_rewards(config.rewards)
    processes = Processes.join()
    output = ensure_directory(config.output)
    checkpoint = load_latest(output / "checkpoints")
    prompts = list(prompts) if prompts is not None else load_prompts(config)
    fingerprint = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    _check_resume(checkpoint, config, fingerprint)
    if checkpoint is not None and checkpoint.step >= config.updates and (output / "lora").is_dir():
        return output / "lora"
    model = model or load_video_model(
        config.model.path,
        device=config.model.device,
        dtype=config.model.dtype,
        local_rank=processes.local_rank,
        load_vae=False,
    )
    if algorithm.needs_lgm:
        lgm = lgm or load_lgm(config.lgm.path, model.device)
    policy = Policy(config, model, processes)
    context = Context(config, model, policy, lgm if algorithm.needs_lgm else None, prompts, processes)
    run = _Run(context, algorithm(context), fingerprint)
    torch.manual_seed(derive_seed(config.seed, "torch", processes.rank))
    start = run.resume(checkpoint) if checkpoint is not None else 0
    if processes.is_main:
        atomic_write(output / "config.yaml", dump_config(config))
    tracker = Tracker(output, total=config.updates, start=start, enabled=processes.is_main, progress=progress)
    with tracker, _stop_signals() as stop:
        try:
            run.loop(start, tracker, stop)
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                "out of memory: lower grpo.micro_batch and sampling.micro_batch, or set "
                "model.gradient_checkpointing: true"
            ) from error
    return output / "lora"


class _Run:
    """Everything that changes while a run goes on."""

    def __init__(self, context: Context, algorithm: Algorithm, fingerprint: str) -> None:
        self.config, self.policy, self.processes = context.config, context.policy, context.processes
        self.model, self.algorithm, self.fingerprint = context.model, algorithm, fingerprint
        self.output = Path(context.config.output)

    def loop(self, start: int, tracker: Tracker, stop: threading.Event) -> None:
        """Do the remaining updates; save every `save_every`, at the end, and when asked to stop."""
        for number in range(start, self.config.updates):
            watch = Stopwatch(self.model.device)
            with watch.stage("total"):
                metrics = self.algorithm.update(number, watch)
            done = number + 1
            stopping = self.processes.any(stop.is_set(), self.model.device)
            # The log line goes first: a checkpoint must never know more updates than the log.
            tracker.log(number, metrics | {f"seconds/{name}": seconds for name, seconds in watch.seconds.items()})
            if done % self.config.save_every == 0 or done == self.config.updates or stopping:
                self.save(done)
            if stopping and done < self.config.updates:
                raise KeyboardInterrupt(f"stopped after update {done} of {self.config.updates}; run again to go on")
        if start >= self.config.updates and self.processes.is_main:
            self.export(start)

    def export(self, step: int) -> None:
        """The LoRA as diffusers loads it, with its model card."""
        directory = self.policy.export(self.output)
        log = self.output / "log.jsonl"
        last = read_jsonl(log)[-1] if log.is_file() else {}
        atomic_write(directory / "README.md", lora_card(self.config, step, last))

    def save(self, step: int) -> None:
        """Checkpoint and LoRA, by the main process; all wait for it."""
        random_states = self._gather_random_states()
        if self.processes.is_main:
            tensors = {**self.policy.tensors(), "random": random_states}
            state = {
                "config": self.config.model_dump(mode="json"),
                "prompts": self.fingerprint,
                "algorithm": self.algorithm.state(),
                "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            }
            save_checkpoint(self.output / "checkpoints", step, tensors, state, keep_last=self.config.keep_last)
            self.export(step)
        self.processes.barrier()

    def resume(self, checkpoint: Checkpoint) -> int:
        """Put back weights, optimizer, random state and the algorithm's own; returns the next update's number."""
        self.policy.load(checkpoint.tensors)
        states = checkpoint.tensors["random"]
        if self.processes.rank < len(states):
            torch.set_rng_state(states[self.processes.rank])
        self.algorithm.load_state(checkpoint.state["algorithm"])
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        if versions != checkpoint.state["versions"]:
            logger.warning(
                "the checkpoint was made with %s, this is %s: the run goes on, but not bit for bit",
                checkpoint.state["versions"],
                versions,
            )
        return checkpoint.step

    def _gather_random_states(self) -> list[torch.Tensor]:
        state = torch.get_rng_state()
        if self.processes.size == 1:
            return [state]
        gathered = self.processes.gather(state.to(self.model.device)).cpu()
        return list(gathered.chunk(self.processes.size))


def load_prompts(config: TrainConfig) -> list[str]:
    """The training prompts: a file's lines, or captions of the embedded world."""
    if config.data.prompts == EMBEDDED:
        from vggrpo.world import sample_prompts

        return sample_prompts(config.data.num_prompts, config.seed, split="train")
    from vggrpo.io.prompts import read_prompts

    return read_prompts(config.data.prompts)


def load_lgm(path: str, device: torch.device) -> GeometryReader:
    """The configured LGM, frozen, on the model's device."""
    from vggrpo.lgm import LatentGeometryModel

    directory = assets.path("lgm") if path == EMBEDDED else Path(path)
    lgm = LatentGeometryModel.from_pretrained(directory)
    _warn_unaudited(directory)
    return lgm.to(device).eval().requires_grad_(False)


def _warn_unaudited(lgm: Path) -> None:
    """Say so when nothing shows that this LGM's reward is signal (METHOD section 2)."""
    audit = lgm / "audit.json"
    if not audit.is_file():
        logger.warning(
            "the LGM in %s was never audited: its reward may be noise; run `vggrpo audit-reward --lgm %s --output %s`",
            lgm, lgm, lgm,
        )  # fmt: skip
    elif not json.loads(audit.read_text()).get("passed"):
        logger.warning("the LGM in %s does not pass its reward audit (%s): its reward is mostly noise", lgm, audit)


def _check_resume(checkpoint: Checkpoint | None, config: TrainConfig, fingerprint: str) -> None:
    if checkpoint is None:
        return
    difference = resume_difference(checkpoint.state["config"], config)
    if difference is None and checkpoint.state["prompts"] != fingerprint:
        difference = "data.prompts: the prompts changed"
    if difference is not None:
        raise UserError(
            f"{config.output} holds a run with another config ({difference}); undo the change or set another output=DIR"
        )


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second SIGINT interrupts at once. Outside of the main thread nothing is
    caught."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.warning("stopping after this update; the run can be resumed")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
