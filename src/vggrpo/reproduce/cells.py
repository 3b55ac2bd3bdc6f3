"""The cells that tables are made of: one training of an arm, its videos on one prompt set with their metrics, and its
comparison with the base model. Each keeps what it finished, so that none is done twice.

    OUTPUT/runs/ARM-sN       training runs, one a seed
    OUTPUT/SET/ARM-sN        videos and their latents
    OUTPUT/SET/eval/ARM-sN   metrics of every video
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vggrpo.config import TrainConfig
from vggrpo.evaluation import (
    Comparison,
    EvaluationModels,
    KernelComparison,
    compare,
    compare_quality,
    evaluate_manifest,
    reference_features,
    summarise_comparison,
    verdict,
)
from vggrpo.evaluation.arms import REFERENCE_CLIPS
from vggrpo.evaluation.benchmarks import load_prompt_sets
from vggrpo.evaluation.latent_scores import REWARDS, score_latents
from vggrpo.evaluation.metrics.quality import KERNEL_DISTANCE
from vggrpo.io.manifest import read_jsonl, read_manifest, write_jsonl
from vggrpo.models.loading import latent_spec, pick_device
from vggrpo.posttraining import train
from vggrpo.posttraining.trainer import load_lgm
from vggrpo.reproduce.judging import chosen_metrics, is_embedded, judges
from vggrpo.reproduce.lgms import audited_lgm
from vggrpo.reproduce.recipes import Arm, arm_named
from vggrpo.reproduce.settings import (
    Settings,
    arm_config,
    guided_every,
    run_logs,
    seconds_of,
    seconds_of_run,
)
from vggrpo.rewards.latent import WeightedLatentReward
from vggrpo.rewards.registry import audited_options
from vggrpo.sampling.generate import generate_videos
from vggrpo.sampling.guidance import RewardGuidance
from vggrpo.sampling.steering import Steering

T = TypeVar("T")
Row = dict[str, Any]
Say = Callable[[str], None]
GUIDING = {"camera_motion_smoothness": 1.0, "geometry_reprojection_consistency": 1.0}
FEWEST_SEEDS = 3  # training runs that a claim about a method takes
BASE = Arm("base", "the untouched model")


def is_trained(arm: Arm) -> bool:
    """Whether an arm samples with a LoRA, its own or another's."""
    return arm.train is not None or bool(arm.lora_of)


def training_seeds(arm: Arm, settings: Settings) -> int:
    """Training seeds of an arm; what is not trained has none, and counts once."""
    return settings.seeds if is_trained(arm) else 1


def trained(arm: Arm, seed: int, folder: Path, settings: Settings, say: Say) -> Path | None:
    """The LoRA of an arm, trained if it is not there yet; None for an arm that samples with the base model."""
    if arm.lora_of:
        return trained(arm_named(arm.lora_of), seed, folder, settings, say)
    if arm.train is None:
        return None
    if arm.lgm is not None:
        say(f"LGM of {arm.name}")
        audited_lgm(arm, settings, folder)
    for other in filter(None, (arm.seconds_of, arm.clips_of)):
        trained(arm_named(other), seed, folder, settings, say)
    seconds, clips = seconds_budget(arm, seed, folder)
    config = arm_config(arm, settings, folder, seed, seconds=seconds, clips=clips)
    say(f"train {arm.name}, seed {seed}")
    return train(config, progress=not settings.quick)


def seconds_budget(arm: Arm, seed: int, folder: Path) -> tuple[float | None, float]:
    """Seconds after which an arm ends (None: it is not timed), and the factor on the clips that it makes beforehand.

    To end updates when the time is over would be unfair to an arm that makes its clips beforehand: nearly all of its
    time is theirs, so it ends after one step, or passes over them again and again. It gets as many clips as fit.
    """
    if not arm.seconds_of:
        return None, 1.0
    seconds = seconds_of_run(arm.seconds_of, folder, seed)
    return (None, seconds / seconds_of_run(arm.clips_of, folder, seed)) if arm.clips_of else (seconds, 1.0)


def measured(arm: Arm, seed: int, prompt_set: str, folder: Path, settings: Settings, say: Say) -> list[Row]:
    """Metrics rows of an arm's videos for one training seed, with the two rewards of their latents."""
    lora = trained(arm, seed, folder, settings, say)
    return measured_with(lora, f"{arm.name}-s{seed}", arm, prompt_set, folder, settings, say)


def measured_with(
    lora: Path | None, name: str, arm: Arm, prompt_set: str, folder: Path, settings: Settings, say: Say
) -> list[Row]:
    """`measured` with any LoRA, under the name that its folders get. The rewards are read through the recipe's LGM,
    whatever the arm was trained with."""
    prompts = [prompt.text for prompt in load_prompt_sets([prompt_set], settings.prompts)]
    run_dir = folder / prompt_set
    say(f"generate and evaluate {prompt_set}/{name}")
    config = settings.recipe()
    manifest = generate_videos(
        prompts,
        run_dir / name,
        pipeline=config.model.path,
        lora=lora,
        arm=arm.name,
        seeds=range(settings.videos),
        num_steps=settings.steps,
        guidance_scale=settings.guidance(config),
        num_frames=config.data.num_frames,
        size=(config.data.height, config.data.width),
        fps=settings.frame_rate(config),
        micro_batch=settings.at_once(config),
        device=settings.device,
        dtype=config.model.dtype,
        save_latents=True,
        steering=_steering(arm, config, settings),
    )
    found = evaluate_manifest(manifest, run_dir / "eval" / name, chosen_metrics(settings), models=judges(settings))
    rows = read_jsonl(found)
    if all(REWARDS.keys() <= row["metrics"].keys() for row in rows):
        return rows
    options = audited_options(config.rewards)
    return score_latents(run_dir, name, config.lgm.path, pick_device(settings.device), options, config.model.path)


def _steering(arm: Arm, config: TrainConfig, settings: Settings) -> Steering | None:
    """What steers an arm's sampling: the two rewards with the recipe's options, through the recipe's LGM."""
    if arm.guidance is None and arm.candidates == 1:
        return None
    options = audited_options(config.rewards)  # steer by what is trained and reported
    lgm = load_lgm(config.lgm.path, pick_device(settings.device), latent_spec(config.model.path))
    reward = WeightedLatentReward(lgm, GUIDING, options)
    every = guided_every(arm, settings)
    guidance = RewardGuidance(reward, arm.guidance or 0.0, every=every, detach_velocity=arm.detach)
    return Steering(reward, "motion + geometry", guidance, arm.candidates, options)


def pooled(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows of several training seeds as seeds of the pair, so that they are averaged in a prompt."""
    return [row | {"seed": 1000 * s + row["seed"]} for s, rows in enumerate(runs) for row in rows]


def partners(runs: Sequence[T], count: int) -> list[T]:
    """One of the other side's runs for each of `count` training seeds; what is not trained has one run for all."""
    return list(runs) * count if len(runs) == 1 else list(runs)


def paired(before: Sequence[Sequence[Row]], after: Sequence[Sequence[Row]]) -> Comparison:
    """The runs of an arm, one a training seed, against as many of another, or against its only one."""
    return compare(pooled(partners(before, len(after))), pooled(after))


def run_by_run(before: Sequence[Sequence[Row]], after: Sequence[Sequence[Row]]) -> list[Comparison]:
    """As `paired`, each training seed by itself: pooled, an effect of one run in three looks like one of all."""
    return [paired([one], [other]) for one, other in zip(partners(before, len(after)), after, strict=True)]


def joined_manifest(sets: Sequence[str], name: str, folder: Path) -> Path:
    """One manifest of a model's videos of several prompt sets; of one set its own."""
    manifests = [folder / prompt_set / name / "manifest.jsonl" for prompt_set in sets]
    if len(manifests) == 1:
        return manifests[0]
    rows = [
        row | {"path": str((manifest.parent / row["path"]).relative_to(folder))}
        for manifest in manifests
        for row in read_jsonl(manifest)
    ]
    return write_jsonl(folder / f"{'+'.join(sets)}-{name}.jsonl", rows)


def run_manifests(arm: Arm, runs: int, sets: Sequence[str], folder: Path) -> list[Path]:
    """The manifest of each training seed's videos."""
    return [joined_manifest(sets, f"{arm.name}-s{seed}", folder) for seed in range(runs)]


def compared(
    arm: Arm,
    reference: Arm,
    runs: Mapping[str, Sequence[Sequence[Row]]],
    sets: Sequence[str],
    folder: Path,
    settings: Settings,
) -> dict[str, Any]:
    """A row of a table: differences from the reference over the prompts of `sets`, and whether they count.

    Args:
        reference: the base model, or the arm whose LoRA this one samples with.
        runs: rows by arm, one list a training seed.
    """
    before, after = runs[reference.name], runs[arm.name]
    comparison, singles = paired(before, after), run_by_run(before, after)
    theirs = partners(run_manifests(reference, len(before), sets, folder), len(after))
    manifests = list(zip(theirs, run_manifests(arm, len(after), sets, folder), strict=True))
    kernels = []
    if is_embedded(settings):  # its features are those of the embedded classifier
        kernels = [compare_quality(*pair, reference=reference_clips(settings)) for pair in manifests]
    kernel = worst_kernel(kernels) if kernels else None
    judged = verdict(comparison, kernel, singles)
    if is_trained(arm):
        if kernels:
            outcome, text = judged.checks["quality"]
            judged.checks["quality"] = (outcome, f"{text}; the worst of {len(after)} training seeds")
        judged.checks["training seeds"] = seeds_check(len(after))
    metrics = summarise_comparison(comparison, kernel, singles)
    if kernels:
        metrics[KERNEL_DISTANCE]["by_training_seed"] = [each.difference.mean for each in kernels]
    row: dict[str, Any] = {
        "metrics": metrics,
        "motion_ratio": comparison.motion_ratio,
        "training_seeds": len(after),
        "counts": judged.counts,
        "checks": {name: {"outcome": outcome, "about": text} for name, (outcome, text) in judged.checks.items()},
    }
    if arm.guidance is not None and reference is BASE:
        row["equal_to_base"] = same_latents(*manifests[0])
    return row


def reference_clips(settings: Settings) -> NDArray[np.float32]:
    """Features of the rendered clips that every kernel distance is taken to."""
    data = settings.recipe().data
    return _rendered(8 if settings.quick else REFERENCE_CLIPS, data.num_frames, (data.height, data.width))


@cache
def _rendered(count: int, num_frames: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """Rendering takes a while, and each training seed of each arm asks for the same clips."""
    return reference_features(count, EvaluationModels(), num_frames=num_frames, size=size)


def worst_kernel(kernels: Sequence[KernelComparison]) -> KernelComparison:
    """That of the training seed whose pictures may have lost most, by how far its interval reaches over its margin: a
    method keeps quality if each of its runs does.
    """
    return max(kernels, key=lambda kernel: kernel.against_base_itself.worst - kernel.against_base_itself.margin)


def seeds_check(seeds: int) -> tuple[bool, str]:
    """Whether a difference is one of a method, or of one training run."""
    return seeds >= FEWEST_SEEDS, f"training seeds: {seeds}; a claim needs {FEWEST_SEEDS}"


def same_latents(first: Path, second: Path) -> bool:
    """Whether the videos that two manifests list came from the same latents, bit for bit.

    The rows say which files, not the manifests' directories: manifests of several prompt sets lie in one directory.
    """
    files = [latent_files(manifest) for manifest in (first, second)]
    return files[0].keys() == files[1].keys() and all(
        file.read_bytes() == files[1][pair].read_bytes() for pair, file in files[0].items()
    )


def latent_files(manifest: Path) -> dict[tuple[str, int], Path]:
    """By (prompt, seed), the file of a video's latents."""
    return {
        (row.prompt, row.seed): (manifest.parent / row.path).with_suffix(".safetensors")
        for row in read_manifest(manifest)
    }


def spent(arm: Arm, folder: Path, settings: Settings) -> dict[str, Any]:
    """Budgets: videos and seconds of training (mean of the seeds), and what one video costs to sample."""
    logs = run_logs(arm.name, folder, training_seeds(arm, settings))
    out: dict[str, Any] = {}
    if logs:
        out["training_videos"] = sum(sum(row.get("videos") or 0 for row in log) for log in logs) / len(logs)
        out["training_seconds"] = sum(seconds_of(log) for log in logs) / len(logs)
        out["training_updates"] = sum(len(log) for log in logs) / len(logs)
    costs = sorted(folder.glob(f"*/{arm.name}-s0/{arm.name}/cost.json"))
    if costs:
        cost: Mapping[str, Any] = json.loads(costs[0].read_text())
        out["sampling"] = {key: value for key, value in cost.items() if key.endswith(("per_video", "device"))}
    return out
