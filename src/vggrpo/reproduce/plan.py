"""What a reproduction would do, and about how long it takes here: a small trial is timed, and each cell follows.

The trial makes what the cells are made of (updates of GRPO, a few videos with their metrics, a small LGM where one is
needed) in a temporary directory. Rivals are priced by GRPO's parts: making and scoring a video, and a clip at a noise
level with gradient. So it is an estimate: right about the hours, not about the minutes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vggrpo.config import TrainConfig
from vggrpo.config_lgm import load_lgm_config
from vggrpo.evaluation.benchmarks import load_prompt_sets
from vggrpo.io.manifest import read_jsonl
from vggrpo.posttraining import train
from vggrpo.pretraining.distill import train_lgm
from vggrpo.reproduce.arms import chosen_arms
from vggrpo.reproduce.cells import BASE, measured_with, training_seeds
from vggrpo.reproduce.hacking import SETS, mark_updates
from vggrpo.reproduce.lgms import lgm_config
from vggrpo.reproduce.recipes import FAR, STITCHED, STUDIES, TABLES, VGGRPO, Arm, arm_named
from vggrpo.reproduce.run import checked_names
from vggrpo.reproduce.settings import Settings, arm_config, guided_every, lgm_folder

_GRADIENT = 3  # network passes that a pass with its gradient costs, roughly
_TRIAL_CLIPS, _TRIAL_UPDATES = 4, 2


@dataclass(frozen=True)
class Cell:
    """One thing to do: a training, the videos of an arm on a prompt set, an LGM, an analysis. `seconds`: None where
    nothing tells; `done`: there already."""

    kind: str
    name: str
    seconds: float | None
    done: bool = False


@dataclass(frozen=True)
class Costs:
    """Seconds of the trial's parts.

    Attributes:
        video: rolled out and scored in training.
        gradient: a clip at a noise level, with gradient.
        start: of a training, before its first update.
        sampled: a video of evaluation, generated, measured and scored.
        lgm_clip: a clip in an LGM's cache and search.
        lgm_update: an update of an LGM on its batch.
        cores: CPU seconds in each of these seconds: what the trial got of a machine that may have been busy.
    """

    video: float
    gradient: float
    start: float
    sampled: float
    lgm_clip: float = 0.0
    lgm_update: float = 0.0
    cores: float = 1.0


def plan(names: Sequence[str], output: Path, settings: Settings, arms: Sequence[str] = ()) -> tuple[list[Cell], Costs]:
    """Every cell of some tables and studies with what it would take, and the trial; nothing is written to `output`.

    Raises:
        UserError: as `reproduce`.
    """
    chosen = [arm for name in checked_names(names, arms) for arm in chosen_arms(name, arms, settings)]
    with_lgm = [*chosen, *(STITCHED if "stitch" in names else ())]
    needs_lgm = next((arm for arm in with_lgm if arm.lgm is not None), None)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter(), time.process_time()
        costs = trial(Path(folder), settings, needs_lgm)
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    costs = replace(costs, cores=cpu / wall)
    return cells(names, output, settings, arms, costs), costs


def cells(names: Sequence[str], output: Path, settings: Settings, arms: Sequence[str], costs: Costs) -> list[Cell]:
    """The cells by those costs, each once; what `output` holds already is done."""
    found: dict[tuple[str, str], Cell] = {}

    def add(*more: Cell) -> None:
        for cell in more:
            found.setdefault((cell.kind, cell.name), cell)

    for name in names:
        if name == "hacking":
            add(*_hacking_cells(output, settings, costs))
        elif name == "stitch":
            add(*[_lgm(arm, output, settings, costs) for arm in STITCHED])
        elif name in STUDIES:
            add(Cell("analysis", name, None, (output / f"{name}.json").is_file()))
        else:
            sets = settings.sets or TABLES[name].sets
            add(*[_videos(BASE, "base-s0", each, output, settings, costs) for each in sets])
            for arm in chosen_arms(name, arms, settings):
                add(*_arm_cells(arm, sets, output, settings, costs))
    return list(found.values())


def _arm_cells(arm: Arm, sets: Sequence[str], output: Path, settings: Settings, costs: Costs) -> list[Cell]:
    out = []
    owner = arm_named(arm.lora_of) if arm.lora_of else arm
    for each in [owner, *map(arm_named, filter(None, (owner.seconds_of, owner.clips_of)))]:
        if each.lgm is not None:
            out.append(_lgm(each, output, settings, costs))
        if each.train is not None:
            out += [_training(each, seed, output, settings, costs) for seed in range(settings.seeds)]
    for seed in range(training_seeds(arm, settings)):
        for each in {arm.name: arm, owner.name: owner}.values():  # an arm is compared with the owner of its LoRA, too
            out += [_videos(each, f"{each.name}-s{seed}", name, output, settings, costs) for name in sets]
    return out


def _training(arm: Arm, seed: int, output: Path, settings: Settings, costs: Costs) -> Cell:
    priced = arm_named(arm.seconds_of) if arm.seconds_of else arm
    config = arm_config(priced, settings, output, seed)
    run = output / "runs" / f"{arm.name}-s{seed}"
    log = read_jsonl(run / "log.jsonl") if (run / "log.jsonl").is_file() else []
    done = bool(log) and (run / "lora").is_dir() and (bool(arm.seconds_of) or len(log) >= config.updates)
    return Cell("train", f"{arm.name}, seed {seed}", training_seconds(config, costs), done)


def training_seconds(config: TrainConfig, costs: Costs) -> float:
    """A training by the number of its videos and of its clips with gradient."""
    videos, gradients = budget(config)
    decodes = 2 if config.needs_vae else 1  # decoded and read in RGB
    return costs.start + videos * costs.video * decodes + gradients * costs.gradient


def budget(config: TrainConfig) -> tuple[int, int]:
    """Videos that a training makes, and clips at a noise level that carry gradient."""
    grpo, nft, direct = config.grpo, config.nft, config.direct
    offline = {"sft": config.sft.candidates, "dpo": config.dpo.candidates}
    if config.algorithm in offline:
        batch = config.sft.batch if config.algorithm == "sft" else 2 * config.dpo.batch
        return config.data.num_prompts * offline[config.algorithm], config.updates * batch
    each, samples = {
        "grpo": (grpo.prompts_per_update * grpo.samples_per_prompt, config.sampling.window),
        "nft": (nft.prompts_per_update * nft.samples_per_prompt, nft.times),
        "direct": (direct.prompts_per_update * direct.samples_per_prompt, direct.grad_steps),
    }[config.algorithm]
    return config.updates * each, config.updates * each * samples


def _videos(arm: Arm, name: str, prompt_set: str, output: Path, settings: Settings, costs: Costs) -> Cell:
    count = _prompts(prompt_set, settings.prompts) * settings.videos
    done = (output / prompt_set / "eval" / name / "metrics.jsonl").is_file()
    return Cell("videos", f"{prompt_set}/{name}", count * costs.sampled * sampling_factor(arm, settings), done)


@cache
def _prompts(prompt_set: str, limit: int) -> int:
    """Prompts of a set; drawing those of the embedded world takes a while."""
    return len(load_prompt_sets([prompt_set], limit))


def sampling_factor(arm: Arm, settings: Settings) -> float:
    """What a video of an arm costs relative to plain sampling, by its network passes."""
    if not arm.guidance:
        return float(arm.candidates)
    every = guided_every(arm, settings)
    guided = len(range(every, settings.steps, every))
    return arm.candidates * (1 + guided * _GRADIENT * (not arm.detach) / settings.steps)


def _lgm(arm: Arm, output: Path, settings: Settings, costs: Costs) -> Cell:
    config = lgm_config(arm, settings, output)
    clips = config.clips.max_clips / (1 - config.clips.generated_share)
    views = 1 + (config.clips.num_frames - 1) // 4
    factor = 1 if config.stitch.view_rate == "latent" else config.clips.num_frames / views
    updates = config.updates * config.distill.batch / _TRIAL_CLIPS * costs.lgm_update
    seconds = (clips * costs.lgm_clip + updates) * factor
    return Cell("LGM", arm.name, seconds, (lgm_folder(arm, output) / "lgm" / "card.json").is_file())


def _hacking_cells(output: Path, settings: Settings, costs: Costs) -> list[Cell]:
    out = [_videos(BASE, "base-s0", each, output, settings, costs) for each in settings.sets or SETS]
    for arm in FAR:
        marks = mark_updates(arm_config(arm, settings, output, 0), settings)
        config = arm_config(arm, settings, output, 0, updates=marks[-1])
        for seed in range(settings.seeds):
            done = (output / "runs" / f"{arm.name}-s{seed}" / "marks" / f"{marks[-1]:06d}").is_dir()
            out.append(Cell("train", f"{arm.name}, seed {seed}", training_seconds(config, costs), done))
            names = [f"{arm.name}-{updates:06d}-s{seed}" for updates in marks]
            out += [
                _videos(arm, name, each, output, settings, costs) for each in settings.sets or SETS for name in names
            ]
    return out


def trial(folder: Path, settings: Settings, lgm: Arm | None = None) -> Costs:
    """Time the parts; `lgm`: an arm whose LGM is tried, None: no LGM is needed."""
    config = arm_config(VGGRPO, settings, folder, 0, updates=2)
    values = config.model_dump(mode="json")
    values["grpo"]["prompts_per_update"] = 1
    values["data"]["num_prompts"] = min(2, values["data"]["num_prompts"])
    config = TrainConfig.model_validate(values)
    started = time.perf_counter()
    train(config, progress=False)
    wall = time.perf_counter() - started
    rows = read_jsonl(Path(config.output) / "log.jsonl")
    last, videos = rows[-1], config.grpo.samples_per_prompt
    replayed = videos * config.sampling.window
    small = replace(settings, prompts=2, videos=1)
    prompt_set = next(iter(settings.sets), "world-static")
    started = time.perf_counter()
    measured_with(None, "trial", BASE, prompt_set, folder, small, lambda _: None)
    costs = Costs(
        video=(last["seconds/rollout"] + last["seconds/reward"]) / videos,
        gradient=last["seconds/replay"] / replayed,
        start=wall - sum(row["seconds/total"] for row in rows),
        sampled=(time.perf_counter() - started) / 2,
    )
    return costs if lgm is None else replace(costs, **_lgm_trial(lgm, folder, settings))


def _lgm_trial(arm: Arm, folder: Path, settings: Settings) -> dict[str, Any]:
    values = lgm_config(arm, settings, folder).model_dump(mode="json")
    values["updates"], values["distill"]["batch"] = _TRIAL_UPDATES, _TRIAL_CLIPS
    values["clips"] |= {"max_clips": _TRIAL_CLIPS, "heldout_share": 0.3}
    values["save_every"] = _TRIAL_UPDATES
    config = load_lgm_config(values)
    started = time.perf_counter()
    train_lgm(config, progress=False)
    wall = time.perf_counter() - started
    rows = read_jsonl(Path(config.output) / "log.jsonl")
    updates = sum(row["seconds/update"] for row in rows)
    clips = _TRIAL_CLIPS / (1 - config.clips.generated_share)
    return {"lgm_clip": (wall - updates) / clips, "lgm_update": rows[-1]["seconds/update"]}


def plan_lines(found: Sequence[Cell], costs: Costs) -> list[str]:
    """The plan for people, with its total: hours on the machine as busy as it is, and the work in them."""
    lines = []
    for cell in found:
        cost = "done" if cell.done else "not estimated" if cell.seconds is None else f"{cell.seconds / 60:.1f} min"
        lines.append(f"{cell.kind:9s} {cell.name:48s} {cost:>13s}")
    left = [cell for cell in found if not cell.done]
    seconds = sum(cell.seconds or 0.0 for cell in left)
    unknown = sum(cell.seconds is None for cell in left)
    also = f", and {unknown} that are not estimated" if unknown else ""
    total = f"about {seconds / 3600:.1f} hours on this machine, of which the trial got {costs.cores:.2f} cores"
    work = f"{seconds * costs.cores / 3600:.1f} core-hours"
    return [*lines, f"{len(left)} of {len(found)} cells to do: {total} ({work}){also}"]
