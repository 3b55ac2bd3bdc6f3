"""How large a reproduction is, and the training config that follows for each arm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vggrpo.config import EMBEDDED, TrainConfig, load_config
from vggrpo.config_algorithms import least_micro_batch
from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_write_json
from vggrpo.io.manifest import read_jsonl
from vggrpo.io.prompts import read_prompts
from vggrpo.reproduce.recipes import Arm, equal_budget, kept_rewards

# The smallest run of every algorithm.
_QUICK = (
    "updates=1", "data.num_prompts=2", "sampling.num_steps=3", "sampling.window=1", "sampling.window_last=null",
    "grpo.prompts_per_update=1", "grpo.samples_per_prompt=2", "grpo.base_travel_samples=1",
)  # fmt: skip
_BATCH = 8  # videos at once
_FREE = {"judge", "metrics", "batch"}  # may change in an output: how it is measured, and how fast it is made
_ENDLESS = 1_000_000  # updates of a training that its seconds end
_PAIR_GUIDANCE = 3.0  # at least, of the clips that DPO's pairs are made of: without guidance few have matches


@dataclass(frozen=True)
class Settings:
    """How large a reproduction is.

    Attributes:
        config: training recipe.
        lgm_config: recipe of the LGMs that arms train for themselves.
        seeds: training runs per arm.
        prompts: at most so many of each prompt set.
        videos: videos per prompt and model.
        steps: denoising steps.
        guidance_scale: classifier-free guidance of the videos; None: that of the recipe's roll-outs.
        updates: of GRPO; None: the recipe's. The rivals get the same number of videos.
        far: updates of the study of reward hacking; None: five times those of GRPO.
        marks: how often that study looks at the model on the way.
        device: of everything.
        overrides: config fields of all trainings, such as `lgm.path=DIR`.
        sets: prompt sets; empty: those of the table.
        judge: directory or hub id of the geometry network that judges; None: the embedded one, of embedded videos only.
        metrics: "fast", "all", or names joined by commas.
        fps: frames per second of the videos, and of the clips of DPO pairs; None: `dpo.fps` of the recipe.
        batch: videos at once when they are generated; None: 8, or the recipe's `sampling.micro_batch` where that is
            less.
        quick: the smallest sizes: shows that the recipe runs, and nothing else.
    """

    config: str = "tiny"
    lgm_config: str = "lgm-tiny"
    seeds: int = 3
    prompts: int = 48
    videos: int = 2
    steps: int = 20
    guidance_scale: float | None = None
    updates: int | None = None
    far: int | None = None
    marks: int = 8
    device: str = "auto"
    overrides: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    judge: str | None = None
    metrics: str = "fast"
    fps: float | None = None
    batch: int | None = None
    quick: bool = False

    def smallest(self) -> Settings:
        """The quick version."""
        return replace(self, seeds=1, prompts=2, videos=1, steps=3, far=2, marks=2, quick=True)

    def record(self) -> dict[str, Any]:
        """All of it as plain data, with the guidance that follows from the recipe."""
        return asdict(self) | {"guidance_scale": self.guidance(self.recipe())}

    def guidance(self, recipe: TrainConfig) -> float:
        """Classifier-free guidance of the videos."""
        return recipe.sampling.guidance_scale if self.guidance_scale is None else self.guidance_scale

    def frame_rate(self, recipe: TrainConfig) -> float:
        """Frames per second of the videos."""
        return recipe.dpo.fps if self.fps is None else self.fps

    def at_once(self, recipe: TrainConfig) -> int:
        """Videos that are generated together."""
        return self.batch or min(_BATCH, least_micro_batch(recipe.sampling.micro_batch))

    def recipe(self) -> TrainConfig:
        """The training recipe with the fields that all arms share."""
        return load_config(self.config, self.overrides)


def arm_config(
    arm: Arm,
    settings: Settings,
    folder: Path,
    seed: int,
    *,
    updates: int | None = None,
    seconds: float | None = None,
    clips: float = 1.0,
) -> TrainConfig:
    """The training config of an arm; rivals get the budget of the GRPO recipe.

    Args:
        updates: instead of those of the budget.
        seconds: train for as long instead of for equally many videos.
        clips: factor on the clips that an offline rival makes; its one pass over them grows with it.
    """
    assert arm.train is not None
    size = [] if settings.updates is None else [f"updates={settings.updates}"]
    # A stop rule would make budgets unequal.
    common = [f"output={folder / 'runs' / f'{arm.name}-s{seed}'}", f"seed={seed}", f"model.device={settings.device}",
              "stop={}"]  # fmt: skip
    if arm.lgm is not None:
        common.append(f"lgm.path={lgm_folder(arm, folder) / 'lgm'}")
    overrides = [*size, *(_QUICK if settings.quick else ()), *settings.overrides, *arm.train, *common]
    overrides += kept_rewards(load_config(settings.config, overrides), arm.without)
    config = load_config(settings.config, overrides)
    embedded = config.data.prompts == EMBEDDED or not Path(config.data.prompts).is_file()
    prompts = config.data.num_prompts if embedded else len(read_prompts(config.data.prompts))
    overrides += equal_budget(config, prompts, arm.group, clips)
    if config.algorithm == "dpo":  # pairs are made of clips as people get them
        guidance = max(settings.guidance(config), _PAIR_GUIDANCE)
        overrides += [f"sampling.guidance_scale={guidance}", f"dpo.fps={settings.frame_rate(config)}"]
    if seconds is not None:
        overrides += [f"updates={_ENDLESS}", f"stop.seconds_above={seconds}"]
    if updates is not None:
        overrides += [f"updates={updates}"]
    return load_config(settings.config, overrides)


def guided_every(arm: Arm, settings: Settings) -> int:
    """Steps between two guided ones: the arm's, or the paper's share of them (steps 20 and 40 of 50)."""
    return arm.guided_every or max(1, settings.steps * 2 // 5)


def lgm_folder(arm: Arm, folder: Path) -> Path:
    """Where an arm's own LGM is made."""
    return folder / "lgms" / arm.name


def run_logs(name: str, folder: Path, seeds: int) -> list[list[dict[str, float]]]:
    """The training log of every seed that there is one of."""
    logs = [folder / "runs" / f"{name}-s{seed}" / "log.jsonl" for seed in range(seeds)]
    return [read_jsonl(log) for log in logs if log.is_file()]


def seconds_of(log: list[dict[str, float]]) -> float:
    """What a training took: all its updates, with the clips that were made before the first one."""
    return round(sum(row["seconds/total"] for row in log), 1)


def seconds_of_run(name: str, folder: Path, seed: int) -> float:
    """`seconds_of` a run that has a log."""
    return seconds_of(read_jsonl(folder / "runs" / f"{name}-s{seed}" / "log.jsonl"))


def known_digests(path: Path) -> dict[str, str]:
    """By the `settings.json` of an output, what it is made of; nothing where there is none (yet)."""
    return json.loads(path.read_text(encoding="utf-8")).get("digests", {}) if path.is_file() else {}


def check_settings(path: Path, settings: Settings, digests: Mapping[str, str] | None = None) -> None:
    """Results of other settings in the same place are an error, not a mixture. Where there is none yet, as after a
    call that failed, any settings will do; and training seeds may become more, since every seed is a run of its own.

    Args:
        path: `settings.json` of the output.
        settings: of this call.
        digests: of what they name (`digests.digests`); what the output has no digest of is accepted and kept from now
            on.

    Raises:
        UserError: names what differs.
    """
    values = json.loads(json.dumps(settings.record()))
    known: dict[str, str] = {}
    if path.is_file() and any(file != path for file in path.parent.iterdir()):
        before = json.loads(path.read_text(encoding="utf-8"))
        more_seeds = values["seeds"] > before.get("seeds", values["seeds"])
        for key, value in values.items():
            if key in before and key not in _FREE and before[key] != value and not (key == "seeds" and more_seeds):
                raise UserError(
                    f"{path.parent} holds a reproduction with {key} {before[key]!r}, not {value!r}; "
                    "name another --output"
                )
        known = before.get("digests", {})
        for name, digest in (digests or {}).items():
            if known.get(name, digest) != digest:
                raise UserError(
                    f"{path.parent} holds a reproduction with another content of the {name} ({known[name]}, now "
                    f"{digest}); undo that change, or name another --output"
                )
    atomic_write_json(path, values | {"digests": {**known, **(digests or {})}})
