"""The study of reward hacking: train far past the optimum, look at the model on the way, and see which watch notices.

    OUTPUT/runs/far-sN/marks/000080   the LoRA after 80 updates
    OUTPUT/hacking.{json,md,png}

Watches of training are read off its log (camera travel and share of moving pixels relative to the base model, KL), each
averaged over the last updates; independent ones are measured on videos of held-out prompts at every mark: the first
mark at which a metric is clearly worse than at its own best mark so far, the base model being mark 0. Clearly: p below
.05 after Bonferroni's correction for the looks that are taken at it, one a mark and prompt set. Motion, a guard, calls
where less of it than counts is left. The first crossing is what a stop rule should have seen, and the KL there is what
a rule can see in training.
"""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vggrpo.config import TrainConfig
from vggrpo.evaluation import summarise_comparison
from vggrpo.evaluation.summary import MOTION_RANGE
from vggrpo.io.atomic import atomic_write, atomic_write_json
from vggrpo.posttraining import train
from vggrpo.reproduce.cells import BASE, Row, Say, measured, measured_with, paired
from vggrpo.reproduce.curves import MOTION, draw_hacking
from vggrpo.reproduce.recipes import FAR, Arm
from vggrpo.reproduce.results import ALPHA, MARKS, difference_cell, footer, number_cell, quick_note
from vggrpo.reproduce.settings import Settings, arm_config, run_logs

SETS = ("world-static", "world-dynamic")
FAR_FACTOR = 5
# Where the recipe has no stop rule: under 0.8 of the base model's motion no improvement counts.
DEFAULT_FLOOR, DEFAULT_KL = 0.8, 0.005
LOGGED = {
    "camera travel": ("camera_travel_ratio", "travel_below"),
    "share of moving pixels": ("dynamic_share_ratio", "dynamics_below"),
    "share of subject pixels": ("subject_share_ratio", "subjects_below"),
    "KL": ("kl", "kl_above"),
}
MEASURED = ("epipolar_inliers", "judge_reprojection", "flow_cycle", "adherence")
REWARDS = ("motion_reward", "geometry_reward")


def mark_updates(config: TrainConfig, settings: Settings) -> list[int]:
    """After how many updates the model is looked at, evenly up to the end."""
    last = settings.far or FAR_FACTOR * config.updates
    return sorted({max(1, round(last * (i + 1) / settings.marks)) for i in range(settings.marks)})


def lora_at(arm: Arm, seed: int, updates: int, folder: Path, settings: Settings) -> Path:
    """The LoRA after so many updates. Marks must be asked for in their order: a run goes on from one to the next, and
    is bit for bit the run that was never stopped."""
    config = arm_config(arm, settings, folder, seed, updates=updates)
    kept = Path(config.output) / "marks" / f"{updates:06d}"
    if not kept.is_dir():
        exported = train(config, progress=not settings.quick)
        temporary = kept.with_name(f".{kept.name}.{uuid.uuid4().hex[:8]}.partial")
        shutil.copytree(exported, temporary)
        os.replace(temporary, kept)
    return kept


def study_hacking(folder: Path, settings: Settings, common: Mapping[str, Any], say: Say) -> Path:
    """Run what is missing of the study, and write its results."""
    limits = thresholds(settings.recipe())
    arms: dict[str, Any] = {}
    for arm in FAR:
        marks = mark_updates(arm_config(arm, settings, folder, 0), settings)
        found: dict[str, Any] = {"about": arm.about, "marks": marks, "sets": {}}
        runs = _measure(arm, marks, folder, settings, say)
        looks = len(marks) * len(runs)
        for prompt_set, (base, rows) in runs.items():
            found["sets"][prompt_set] = {
                "marks": [_summary(base, each) for each in rows],
                "turned": {name: turning_point(name, base, rows, marks, looks) for name in MEASURED},
            }
        logs = run_logs(arm.name, folder, settings.seeds)
        found["log"] = mean_log(logs, [*(name for name, _ in LOGGED.values()), *_reward_columns(logs)])
        memory = 1 if settings.quick else settings.recipe().stop.memory
        found["log_at_marks"] = log_at(found["log"], marks, memory)
        found["watches"] = watches(found, limits, memory)
        found["first"] = first_to_see(found["watches"])
        found["kl_at_first"] = kl_at_first(found)
        arms[arm.name] = found
    result = dict(common) | {"thresholds": limits, "hacking": arms}
    draw_hacking(folder / "hacking.png", arms, limits)
    atomic_write_json(folder / "hacking.json", result)
    return atomic_write(folder / "hacking.md", _markdown(result))


def thresholds(config: TrainConfig) -> dict[str, float]:
    """Where each watch of training calls: the recipe's own stop rule, or the default where it has none."""
    return {
        name: getattr(config.stop, rule) or (DEFAULT_KL if rule == "kl_above" else DEFAULT_FLOOR)
        for name, (_, rule) in LOGGED.items()
    }


def _measure(
    arm: Arm, marks: Sequence[int], folder: Path, settings: Settings, say: Say
) -> dict[str, tuple[list[Row], list[list[list[Row]]]]]:
    """By prompt set: the base model's rows, and of every mark those of each training seed."""
    sets = settings.sets or SETS
    for seed in range(settings.seeds):  # all marks of a run in their order, before anything is generated
        for updates in marks:
            say(f"train {arm.name}, seed {seed}, {updates} of {marks[-1]} updates")
            lora_at(arm, seed, updates, folder, settings)
    out = {}
    for prompt_set in sets:
        base = measured(BASE, 0, prompt_set, folder, settings, say)
        rows = [
            [
                measured_with(
                    lora_at(arm, seed, updates, folder, settings),
                    f"{arm.name}-{updates:06d}-s{seed}", arm, prompt_set, folder, settings, say,
                )
                for seed in range(settings.seeds)
            ]
            for updates in marks
        ]  # fmt: skip
        out[prompt_set] = (base, rows)
    return out


def _summary(base: Sequence[Row], runs: Sequence[Sequence[Row]]) -> dict[str, Any]:
    comparison = paired([base], runs)
    return {"metrics": summarise_comparison(comparison), "motion_ratio": comparison.motion_ratio}


def turning_point(
    name: str, base: Sequence[Row], rows: Sequence[Sequence[Sequence[Row]]], marks: Sequence[int], looks: int = 1
) -> dict[str, int | None]:
    """The mark at which a metric is best, and the first one that is clearly worse than the best one before it.

    Args:
        base: rows of the base model, mark 0.
        rows: of every mark, those of each training seed.
        marks: updates of the marks.
        looks: at this metric, in all sets together.
    """
    states = [[list(base)], *rows]
    updates = [0, *marks]
    best, crossed = 0, None
    for place in range(1, len(states)):
        found = _versus(name, states[best], states[place], looks)
        if found is None:
            continue
        better, clearly_worse = found
        if clearly_worse and crossed is None:
            crossed = updates[place]
        best = place if better else best
    return {"best": updates[best], "crossed": crossed}


def _versus(
    name: str, before: Sequence[Sequence[Row]], after: Sequence[Sequence[Row]], looks: int
) -> tuple[bool, bool] | None:
    """Whether a metric is better on average afterwards, and whether it is clearly worse, at one of so many looks."""
    metric = paired(before, after).metrics.get(name)
    if metric is None or not metric.pairs:
        return None
    mean = metric.difference.mean
    worse = metric.improved is False and metric.difference.p * looks < ALPHA
    return mean != 0 and (mean > 0) == metric.higher_is_better, worse


def mean_log(logs: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str]) -> dict[str, list[float | None]]:
    """Columns of the training log, averaged over the seeds; None where no seed has a number."""
    length = min((len(log) for log in logs), default=0)
    return {name: [_mean([log[i].get(name) for log in logs]) for i in range(length)] for name in names}


def log_at(
    log: Mapping[str, Sequence[float | None]], marks: Sequence[int], memory: int
) -> dict[str, list[float | None]]:
    """Columns of the log at the marks: the mean of the `memory` updates before each."""
    return {name: [_mean(values[max(0, mark - memory) : mark]) for mark in marks] for name, values in log.items()}


def _reward_columns(logs: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    return sorted(name for name in (logs[0][0] if logs and logs[0] else {}) if name.startswith("reward/"))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def watches(found: Mapping[str, Any], limits: Mapping[str, float], memory: int) -> dict[str, Any]:
    """By watch: what it calls at, and the update of its first call (None: it never did).

    Args:
        found: `log` and `sets` of one arm.
        limits: of the watches of training.
        memory: updates over which the log is averaged.
    """
    out: dict[str, Any] = {}
    for name, (column, field) in LOGGED.items():
        crossed = crossing(found["log"].get(column, []), limits[name], memory, below=field.endswith("below"))
        out[name] = {"threshold": limits[name], "crossed": crossed}
    for name in MEASURED:
        called = {prompt_set: row["turned"][name]["crossed"] for prompt_set, row in found["sets"].items()}
        out[name] = {"threshold": "worse than at its best", "crossed": _earliest(called), "sets": called}
    called = {prompt_set: _standstill(found["marks"], row["marks"]) for prompt_set, row in found["sets"].items()}
    out[MOTION] = {"threshold": MOTION_RANGE[0], "crossed": _earliest(called), "sets": called}
    return out


def _standstill(updates: Sequence[int], marks: Sequence[Mapping[str, Any]]) -> int | None:
    """The first mark at which less motion is left than an improvement needs to count."""
    for update, mark in zip(updates, marks, strict=True):
        if mark["motion_ratio"] is not None and mark["motion_ratio"] < MOTION_RANGE[0]:
            return update
    return None


def _earliest(called: Mapping[str, int | None]) -> int | None:
    return min((update for update in called.values() if update is not None), default=None)


def kl_at_first(found: Mapping[str, Any]) -> float | None:
    """The log's KL (the mean before it) at the first call of an independent metric; None if none called."""
    calls = {name: found["watches"][name]["crossed"] for name in MEASURED}
    first = _earliest(calls)
    return None if first is None else found["log_at_marks"]["kl"][found["marks"].index(first)]


def crossing(values: Sequence[float | None], limit: float, memory: int, *, below: bool) -> int | None:
    """Updates done when the mean of the last `memory` values first lies beyond the limit."""
    for end in range(memory, len(values) + 1):
        average = _mean(values[end - memory : end])
        if average is not None and (average < limit if below else average > limit):
            return end
    return None


def first_to_see(found: Mapping[str, Any]) -> list[str]:
    """The watches that called first; empty if none did."""
    calls = {name: watch["crossed"] for name, watch in found.items() if watch["crossed"] is not None}
    return sorted(name for name, update in calls.items() if update == min(calls.values()))


def _markdown(result: Mapping[str, Any]) -> str:
    lines = [f"# {result['title']}", "", "![curves](hacking.png)", "", *quick_note(result), MARKS, ""]
    for arm, found in result["hacking"].items():
        lines += [f"## {arm}: {found['about']}", "", _verdict(found), ""]
        lines += ["| watch | calls at | first call, updates |", "|---|---|---|"]
        for name, watch in found["watches"].items():
            side = watch["threshold"] if isinstance(watch["threshold"], str) else f"{watch['threshold']:g}"
            lines.append(f"| {name} | {side} | {'never' if watch['crossed'] is None else watch['crossed']} |")
        lines += ["", *_marks_table(found)]
    return "\n".join([*lines, *footer(result)]) + "\n"


def _verdict(found: Mapping[str, Any]) -> str:
    if not found["first"]:
        return f"No watch called in {found['marks'][-1]} updates."
    update = found["watches"][found["first"][0]]["crossed"]
    text = f"First to call: **{' and '.join(found['first'])}**, after {update} of {found['marks'][-1]} updates."
    if found["kl_at_first"] is not None:
        text += f" KL at the first call of an independent metric: {found['kl_at_first']:.2g}, as a rule `kl_above`."
    return text


def _marks_table(found: Mapping[str, Any]) -> list[str]:
    """What training logged, and the differences from the base model, at every mark."""
    columns = [column for column, _ in LOGGED.values()]
    names = (*MEASURED, "motion_flow", *REWARDS)
    lines = []
    for prompt_set, row in found["sets"].items():
        lines += [
            f"### {prompt_set}",
            "",
            "Difference from the base model [95 % interval]; the log's means before it.",
            "",
        ]
        lines += [
            "| updates | " + " | ".join([*columns, *names]) + " |",
            "|" + "---|" * (1 + len(columns) + len(names)),
        ]
        for place, (updates, mark) in enumerate(zip(found["marks"], row["marks"], strict=True)):
            logged = [number_cell(found["log_at_marks"][column][place]) for column in columns]
            cells = [difference_cell(name, mark["metrics"].get(name)) for name in names]
            lines.append(f"| {updates} | " + " | ".join([*logged, *cells]) + " |")
        best = ", ".join(f"{name} {row['turned'][name]['best']}" for name in MEASURED)
        lines += ["", f"Best after so many updates: {best}.", ""]
    return lines
