"""`run_benchmark`: generate both arms with the same seeds, evaluate, compare, report; goes on where it stopped.

DIR/base, DIR/tuned            videos and manifest (with tags such as static, dynamic, camera:orbit_left)
DIR/eval/base, DIR/eval/tuned  metrics of every video
DIR/comparison.md, .json       the paired statistics; DIR/summary.json the short form
DIR/train, DIR/audit.json      log and config of the run that the LoRA lies in, audit of the LGM
DIR/report/index.html          all of it to look at; DIR/benchmark.yaml what was asked for
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from vggrpo import assets
from vggrpo.config import EMBEDDED, load_config
from vggrpo.config_benchmark import BenchmarkConfig, benchmark_difference, dump_benchmark_config
from vggrpo.errors import UserError
from vggrpo.evaluation.arms import compare_quality
from vggrpo.evaluation.benchmarks import BenchmarkPrompt, load_prompt_sets
from vggrpo.evaluation.compare import Comparison, compare_files
from vggrpo.evaluation.evaluate import evaluate_manifest
from vggrpo.evaluation.latent_scores import score_latents
from vggrpo.evaluation.metrics import Clip, select
from vggrpo.evaluation.models import EvaluationModels
from vggrpo.evaluation.report import build_report
from vggrpo.evaluation.scenes import scene_of, write_scenes
from vggrpo.evaluation.summary import Verdict, summarise_comparison, verdict
from vggrpo.io.atomic import atomic_write, atomic_write_json, ensure_directory
from vggrpo.io.manifest import read_manifest, write_manifest
from vggrpo.io.video import read_video
from vggrpo.models.loading import pick_device
from vggrpo.rewards.registry import audited_options
from vggrpo.sampling.generate import generate_videos

ARMS = ("base", "tuned")


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark found, and where it wrote it."""

    comparison: Comparison
    verdict: Verdict
    folder: Path
    report: Path


def run_benchmark(
    config: BenchmarkConfig,
    *,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
) -> BenchmarkResult:
    """Run what is missing of a benchmark.

    Args:
        say: told what begins.
        progress: of the evaluation, called with (videos done, videos in total).

    Raises:
        UserError: before anything is generated, when prompts, LoRA or judges are missing, or the directory holds
            another benchmark.
    """
    prompts = load_prompt_sets(config.prompts, config.limit)
    device = str(pick_device(config.sampling.device))
    models = EvaluationModels(config.judge, config.attributes, device=device)
    models.check(need for metric in select(config.metrics) for need in metric.needs)
    for needed in filter(None, (config.base_lora, config.tuned_lora)):
        if not Path(needed).exists():
            raise UserError(
                f"no LoRA at {needed}; train one first (`vggrpo train`), or name another with tuned_lora=..."
            )
    folder = _prepare(config)
    options = _keep_evidence(config, folder)
    began = time.time()
    for arm, lora in zip(ARMS, (config.base_lora, config.tuned_lora), strict=True):
        say(f"{arm} model: {len(prompts)} prompts x {len(config.seeds)} seeds")
        _generate(config, folder, arm, lora, prompts)
    for arm in ARMS:
        say(f"measuring the {arm} arm")
        manifest = folder / arm / "manifest.jsonl"
        evaluate_manifest(
            manifest, folder / "eval" / arm, config.metrics, workers=config.workers, models=models, progress=progress
        )
        if config.lgm is not None:
            score_latents(folder, arm, config.lgm, device, options, config.pipeline)
        elif any("judge" in metric.needs for metric in select(config.metrics)):
            _judge_scenes(folder, arm, models)
    say("comparison and report")
    return _conclude(config, folder, models, time.time() - began)


def _prepare(config: BenchmarkConfig) -> Path:
    folder = ensure_directory(config.output)
    kept = folder / "benchmark.yaml"
    if kept.is_file() and any(folder.rglob("*.mp4")):  # one that failed before its first video holds nothing
        try:
            saved = yaml.safe_load(kept.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{kept} is damaged; delete {folder} to start afresh, or name another output") from error
        difference = benchmark_difference(saved if isinstance(saved, dict) else {}, config)
        if difference is not None:
            raise UserError(f"{folder} holds another benchmark ({difference}); name another output=...")
    elif any(folder.iterdir()) and not kept.is_file():
        raise UserError(f"{folder} is not empty and holds no benchmark; name another output=...")
    atomic_write(kept, dump_benchmark_config(config))
    return folder


def _keep_evidence(config: BenchmarkConfig, folder: Path) -> dict[str, dict[str, Any]] | None:
    """Copies for the report: log and config of the run that made the tuned LoRA, where it lies in one, and the audit of
    the LGM. Returns the options of the rewards as that training saw them."""
    if config.lgm is not None:
        audit = (assets.path("lgm") if config.lgm == EMBEDDED else Path(config.lgm)) / "audit.json"
        if audit.is_file():
            shutil.copyfile(audit, folder / "audit.json")
    run = Path(config.tuned_lora).resolve().parent
    log, settings = run / "log.jsonl", run / "config.yaml"
    if not (log.is_file() and settings.is_file()):
        return None
    try:
        options = audited_options(load_config(settings).rewards)
    except UserError:  # of another trainer, or another version
        return None
    for file in (log, settings):
        shutil.copyfile(file, ensure_directory(folder / "train") / file.name)
    return options


def _generate(
    config: BenchmarkConfig, folder: Path, arm: str, lora: str | None, prompts: Sequence[BenchmarkPrompt]
) -> None:
    """The videos of one arm, and their tags in its manifest."""
    s = config.sampling
    manifest = generate_videos(
        [prompt.text for prompt in prompts],
        folder / arm,
        pipeline=config.pipeline,
        lora=lora,
        arm=arm,
        seeds=config.seeds,
        num_steps=s.num_steps,
        guidance_scale=s.guidance_scale,
        num_frames=s.num_frames,
        size=(s.height, s.width),
        fps=s.fps,
        micro_batch=s.micro_batch,
        device=s.device,
        dtype=s.dtype,
        save_latents=config.lgm is not None,
    )
    tags = {prompt.text: prompt.tags for prompt in prompts}
    write_manifest(manifest, [replace(row, tags=tags[row.prompt]) for row in read_manifest(manifest)])


def _judge_scenes(folder: Path, arm: str, models: EvaluationModels) -> None:
    """What the judge sees, for the report; a video that cannot be read has its reason among the metrics already."""
    scenes: list[tuple[str, int, dict[str, Any]]] = []
    for row in read_manifest(folder / arm / "manifest.jsonl"):
        try:
            frames, fps = read_video(folder / arm / row.path)
            prediction = models.judge_prediction(Clip(frames, fps, row.prompt, row.seed))
        except UserError:
            continue
        assert prediction.frame_index is not None
        views = frames[prediction.frame_index.tolist()]
        scenes.append((row.prompt, row.seed, scene_of(prediction, views, by="the judge")))
    write_scenes(folder / "scenes" / f"{arm}.jsonl", scenes)


def _conclude(config: BenchmarkConfig, folder: Path, models: EvaluationModels, seconds: float) -> BenchmarkResult:
    comparison = compare_files(folder / "eval" / "base", folder / "eval" / "tuned")
    kernel = None
    if config.reference == "world":
        kernel = compare_quality(folder / "base" / "manifest.jsonl", folder / "tuned" / "manifest.jsonl", models)
    atomic_write(folder / "comparison.json", comparison.to_json() + "\n")
    atomic_write(folder / "comparison.md", comparison.to_markdown())
    summary = {
        "prompts": comparison.prompts,
        "seeds": config.seeds,
        "seconds": round(seconds, 1),  # of the last call
        "motion_ratio": comparison.motion_ratio,
        "metrics": summarise_comparison(comparison, kernel),
    }
    atomic_write_json(folder / "summary.json", summary)
    return BenchmarkResult(comparison, verdict(comparison, kernel), folder, build_report(folder))
