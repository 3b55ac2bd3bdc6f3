"""The trainer that the algorithms share: load, resume, loop, log, checkpoint, export.

A run is a directory. Running again goes on from its last whole checkpoint, bit for bit; SIGINT or SIGTERM saves at the
end of the update, and so does a rule of `config.stop`, which ends the run for good.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vggrpo import assets
from vggrpo.checkpoint import (
    Checkpoint,
    load_latest,
    random_states,
    save_checkpoint,
    seed_generators,
    set_random_states,
)
from vggrpo.config import EMBEDDED, RewardTerm, TrainConfig, dump_config, resume_difference
from vggrpo.distributed import Processes, stop_signals
from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write, disk_full, ensure_directory
from vggrpo.io.manifest import read_jsonl
from vggrpo.models.base import LatentSpec, VideoModel
from vggrpo.models.loading import load_video_model
from vggrpo.posttraining.algorithm import Algorithm, Context, find_algorithm
from vggrpo.posttraining.card import lora_card
from vggrpo.posttraining.conditions import Conditions, load_prompts
from vggrpo.posttraining.micro_batch import is_out_of_memory
from vggrpo.posttraining.policy import NonFiniteError, Policy, class_name, exported
from vggrpo.posttraining.scoring import GeometryReader, check_rewards
from vggrpo.posttraining.validation import Validation, validation_prompts
from vggrpo.posttraining.watch import StopRule
from vggrpo.rewards.registry import audited_options
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
        The directory of the exported weights: OUTPUT/lora, or OUTPUT/transformer with `model.tune: full`.

    Raises:
        UserError: for bad input; nothing of an earlier run is overwritten.
        KeyboardInterrupt: after SIGINT or SIGTERM, when the resumable state is saved.
    """
    algorithm = find_algorithm(config.algorithm)
    check_rewards(config.rewards)
    processes = replace(Processes.join(), even=config.model.shard)
    if not processes.is_main:  # one process warns for all
        logging.getLogger("vggrpo").setLevel(logging.ERROR)
    output = ensure_directory(config.output)
    checkpoint = load_latest(output / "checkpoints")
    _check_shared(processes, output, checkpoint)
    prompts = list(prompts) if prompts is not None else load_prompts(config)
    fingerprint = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    _check_resume(checkpoint, config, fingerprint)
    result = exported(config, output)
    if checkpoint is not None and result.is_dir() and _is_finished(checkpoint, config):
        return result
    with _advice():
        context, fixed = _prepare(config, algorithm, model, lgm, prompts, processes)
        run = _Run(context, algorithm(context), Validation(context, fixed), fingerprint)
        seed_generators(derive_seed(config.seed, "torch", processes.rank))
        start = run.resume(checkpoint) if checkpoint is not None else 0
        if processes.is_main:
            atomic_write(output / "config.yaml", dump_config(config))
        tracker = Tracker(
            output,
            total=config.updates,
            start=start,
            enabled=processes.is_main,
            progress=progress,
            trackers=config.trackers,
            settings=config.model_dump(mode="json"),
        )
        with tracker, stop_signals(context.stop) as stop:
            run.loop(start, tracker, stop)
    return result


def _prepare(
    config: TrainConfig,
    algorithm: type[Algorithm],
    model: VideoModel | None,
    lgm: GeometryReader | None,
    prompts: Sequence[str],
    processes: Processes,
) -> tuple[Context, list[str]]:
    """Everything loaded and encoded, the policy's parameters in place; and the prompts of validation."""
    fixed = validation_prompts(config)
    conditions = Conditions(config, prompts, fixed)
    model = _prepare_model(config, model, conditions, processes)
    if algorithm.needs_lgm:
        lgm = lgm or load_reader(config, model)
    policy = Policy(config, model, processes)
    reader = lgm if algorithm.needs_lgm else None
    return Context(config, model, policy, reader, prompts, conditions, processes), fixed


def _is_finished(checkpoint: Checkpoint, config: TrainConfig) -> bool:
    """Whether nothing is left to do: all updates are done, or a rule of `config.stop` ended the run."""
    if checkpoint.step >= config.updates:
        return True
    reason = StopRule(config.stop, checkpoint.state.get("stop")).reason()
    if reason is not None:
        logger.warning("%s ended after update %d of %d: %s", config.output, checkpoint.step, config.updates, reason)
    return reason is not None


class _Before(NamedTuple):
    """The state before an update. `tensors` are the policy's; None where the last checkpoint has them, and for whole
    weights, of which a copy with their moments is too large: such an update is repeated from that checkpoint."""

    tensors: dict[str, Any] | None
    algorithm: dict[str, Any]
    random: dict[str, torch.Tensor]


class _Run:
    """Everything that changes while a run goes on."""

    def __init__(self, context: Context, algorithm: Algorithm, validation: Validation, fingerprint: str) -> None:
        self.config, self.policy, self.processes = context.config, context.policy, context.processes
        self.model, self.algorithm, self.fingerprint = context.model, algorithm, fingerprint
        self.validation = validation
        self.rule = StopRule(context.config.stop)
        self.output = Path(context.config.output)
        self.saved = 0  # updates in the last checkpoint

    def loop(self, start: int, tracker: Tracker, stop: threading.Event) -> None:
        """Do the remaining updates; save every `save_every`, at the end, when asked to, and when a rule ends it."""
        last = start if self.rule.reason() else self.config.updates  # a rule ended it before the export was whole
        done = min(start, last)
        for number in range(start, last):
            if self.validation.due(number):
                tracker.validate(number, *self.validation.run())
            watch = Stopwatch(self.model.device)
            before = self._before(number)
            try:
                with watch.stage("total"):
                    metrics = self.algorithm.update(number, watch)
            except NonFiniteError:
                raise UserError(self._kept_for_repeating(number, before)) from None
            done = number + 1
            stopping = self.processes.any(stop.is_set(), self.model.device)
            self.rule.observe(metrics, watch.seconds["total"])
            reason = self.rule.reason()
            # Seconds differ between processes, and one that ends must not leave the others waiting.
            ended = self.processes.any(reason is not None, self.model.device)
            # The log line goes first: a checkpoint must never know more updates than the log.
            tracker.log(number, metrics | {f"seconds/{name}": seconds for name, seconds in watch.seconds.items()})
            if done % self.config.save_every == 0 or done == self.config.updates or stopping or ended:
                self.save(done)
            if ended and done < self.config.updates:
                logger.warning("stopped after update %d of %d: %s", done, last, reason or "another process' time is up")
                last = done
                break
            if stopping and done < self.config.updates:
                raise KeyboardInterrupt(f"stopped after update {done} of {self.config.updates}; run again to go on")
        if self.config.validation.every:
            tracker.validate(done, *self.validation.run())
        if self.config.validation.every or start >= last:
            self.export(max(start, done))

    def _before(self, number: int) -> _Before:
        """What repeats update `number`, whatever it changes before it fails."""
        tensors = None if self.policy.full or number == self.saved else self.policy.tensors()
        return _Before(tensors, copy.deepcopy(self.algorithm.state()), random_states(self.model.device))

    def _kept_for_repeating(self, number: int, before: _Before) -> str:
        """After an update that was not finite: keep a run that begins with it, and say so. All processes take part."""
        advice = "lower optim.learning_rate or set model.dtype: float32, and run again to resume"
        said = f"loss or gradient is not finite in update {number}; nothing of it was kept"
        if before.tensors is None:
            return f"{said}: {advice}; without a change the same command repeats it"
        tensors = {**before.tensors, "random": self._gather_random_states(before.random)}
        folder = self.output / f"nonfinite-{number:06d}"
        if self.processes.is_main:
            save_checkpoint(folder / "checkpoints", number, tensors, self._state(before.algorithm), keep_last=1)
        self.processes.barrier()
        return f"{said}: {advice}. output={folder} on the same command repeats that update alone"

    def export(self, step: int) -> None:
        """The weights as diffusers loads them, with their model card; all processes take part."""
        directory = self.policy.export(self.output)
        if self.processes.is_main:
            logs = [self.output / name for name in ("log.jsonl", "validation.jsonl")]
            rows, validations = (read_jsonl(log) if log.is_file() else [] for log in logs)
            last = rows[-1] if rows else {}
            names = {"pipeline": self.model.pipeline, "transformer": class_name(self.model.transformer)}
            atomic_write(directory / "README.md", lora_card(self.config, step, last, validations, **names))

    def save(self, step: int) -> None:
        """Checkpoint and export, written by the main process; all wait for it."""
        tensors = {**self.policy.tensors(), "random": self._gather_random_states(random_states(self.model.device))}
        if self.processes.is_main:
            state = self._state(self.algorithm.state())
            save_checkpoint(self.output / "checkpoints", step, tensors, state, keep_last=self.config.keep_last)
        self.saved = step
        self.export(step)
        self.processes.barrier()

    def _state(self, algorithm: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return {
            "config": self.config.model_dump(mode="json"),
            "prompts": self.fingerprint,
            "algorithm": algorithm,
            "stop": self.rule.state(),
            "versions": _versions(),
        }

    def resume(self, checkpoint: Checkpoint) -> int:
        """Put back weights, optimizer, random state and the algorithm's own; returns the next update's number."""
        self.policy.load(checkpoint.tensors)
        states = checkpoint.tensors["random"]
        if self.processes.rank < len(states):
            set_random_states(states[self.processes.rank], self.model.device)
        self.algorithm.load_state(checkpoint.state["algorithm"])
        self.rule = StopRule(self.config.stop, checkpoint.state.get("stop"))
        if _versions() != checkpoint.state["versions"]:
            logger.warning(
                "the checkpoint was made with %s, this is %s: the run goes on, but not bit for bit",
                checkpoint.state["versions"],
                _versions(),
            )
        self.saved = checkpoint.step
        return checkpoint.step

    def _gather_random_states(self, mine: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """State of the random generators of every process."""
        gathered = {
            name: self.processes.gather(state.to(self.model.device)).cpu().chunk(self.processes.size)
            for name, state in mine.items()
        }
        # Clones: a generator does not take a view into a larger tensor.
        return [{name: parts[rank].clone() for name, parts in gathered.items()} for rank in range(self.processes.size)]


def _prepare_model(
    config: TrainConfig, model: VideoModel | None, conditions: Conditions, processes: Processes
) -> VideoModel:
    """The video model with everything encoded, and without the parts that training does not need."""
    decodes = config.needs_vae or bool(config.validation.every and config.validation.videos)
    images = bool(conditions.missing_images())
    given = model is not None
    if model is None:
        model = load_video_model(
            config.model.path,
            device=config.model.device,
            dtype=config.model.dtype,
            local_rank=processes.local_rank,
            load_vae=decodes or images,
            load_text=bool(conditions.missing_prompts()),
        )
    if conditions.has_first_frames and not model.frame_times:
        raise UserError("data.first_frames needs a model with a time per frame; use Wan2.2-TI2V-5B")
    conditions.encode(model, processes)
    if not given:
        model.release_encoders(vae=not decodes)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    return model


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


@contextmanager
def _advice() -> Iterator[None]:
    """Out of memory and out of disk space are the user's to mend: say with what."""
    try:
        yield
    except Exception as error:
        if reason := disk_full(error):
            raise UserError(
                f"cannot write ({reason}); free space and run again to go on: the last checkpoint is whole"
            ) from error
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: lower grpo.micro_batch and sampling.micro_batch (or set them to auto), or lgm.micro_batch, "
            "or set model.gradient_checkpointing: true, and run again to go on; `vggrpo doctor` estimates what a "
            "recipe needs"
        ) from error


def load_reader(config: TrainConfig, model: VideoModel) -> GeometryReader:
    """What reads geometry for the rewards: the LGM, or (`reward.space: rgb`) a geometry model on decoded frames."""
    if config.reward.space == "rgb":
        from vggrpo.posttraining.rgb_reader import load_rgb_reader

        return load_rgb_reader(config.reward, model)
    return load_lgm(config.lgm.path, model.device, model.latent_spec, config.rewards, config.model.path)


def load_lgm(
    path: str,
    device: torch.device,
    spec: LatentSpec | None = None,
    rewards: Mapping[str, RewardTerm] | None = None,
    pipeline: str = EMBEDDED,
) -> GeometryReader:
    """The configured LGM, frozen, on the model's device; with `spec`, one made for another VAE is refused. `rewards`:
    what its audit should have asked about. `pipeline`: whose latents it reads."""
    from vggrpo.lgm import LatentGeometryModel

    directory = assets.path("lgm") if path == EMBEDDED else Path(path)
    lgm = LatentGeometryModel.from_pretrained(directory)
    if spec is not None:
        lgm.check_latents_of(spec)
    _warn_unaudited(directory, rewards, pipeline)
    return lgm.to(device).eval().requires_grad_(False)


def _warn_unaudited(lgm: Path, rewards: Mapping[str, RewardTerm] | None = None, pipeline: str = EMBEDDED) -> None:
    """Say so when nothing shows that this LGM's reward is signal (METHOD section 2)."""
    audit = lgm / "audit.json"
    try:
        found = json.loads(audit.read_text(encoding="utf-8")) if audit.is_file() else None
    except ValueError:
        found = None  # damaged
    if not isinstance(found, dict):
        options = f"--lgm {lgm} --output {lgm}" + ("" if pipeline == EMBEDDED else f" --video-model {pipeline}")
        logger.warning(
            "the LGM in %s was never audited: its reward may be noise; run `vggrpo audit-reward %s`", lgm, options
        )
    elif not found.get("passed"):
        missed = "; ".join(map(str, found.get("missed") or ["see there"]))
        logger.warning("the LGM in %s does not pass its reward audit (%s): %s", lgm, audit, missed)
    elif rewards is not None and found.get("options", {}) != audited_options(rewards):
        logger.warning("the audit of the LGM in %s asked about other reward options (%s)", lgm, found.get("options"))


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


def _check_shared(processes: Processes, output: Path, checkpoint: Checkpoint | None) -> None:
    """All processes must go on from one checkpoint; those of a machine that does not see it would start afresh."""
    device = torch.device("cuda", processes.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    steps = processes.gather(torch.tensor([-1 if checkpoint is None else checkpoint.step], device=device)).tolist()
    if len(set(steps)) > 1:
        seen = ["none" if step < 0 else f"step {step}" for step in steps]
        raise UserError(
            f"the processes see different checkpoints in {output} ({', '.join(seen)}, by rank); "
            "output must be one directory that all machines share"
        )
