"""`vggrpo demo`: base samples, GRPO on latent rewards, tuned samples with the same seeds, evaluation, report.

    DIR/base, DIR/tuned   videos, latents and manifest of held-out prompts
    DIR/train             the GRPO run: log, checkpoints, LoRA
    DIR/eval              metrics of every video
    DIR/summary.json      the numbers; DIR/report/index.html the pictures

Each stage keeps what it finished, so a second call goes on where the first one stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from vggrpo import assets
from vggrpo.config import TrainConfig, load_config
from vggrpo.errors import UserError
from vggrpo.evaluation import build_report, compare_quality, evaluate_manifest, summarise
from vggrpo.evaluation.latent_scores import score_latents
from vggrpo.io.atomic import atomic_write_json, ensure_directory
from vggrpo.posttraining import train
from vggrpo.rewards.registry import audited_options
from vggrpo.sampling.generate import generate_videos
from vggrpo.world import sample_prompts

PROMPTS, SEEDS, STEPS = 48, (0, 1), 20
GUIDANCE = 1.0  # none, as in the roll-outs: what was trained is what is shown
PROMPT_SEED = 2026
ARMS = ("base", "tuned")


def run_demo(
    output: Path, *, seed: int = 0, updates: int | None = None, fresh: bool = False, prompts: int = PROMPTS
) -> Path:
    """Run what is missing of the demo and return the report's path.

    Args:
        output: directory of the run.
        seed: of training.
        updates: GRPO updates; default as in the recipe `tiny`.
        fresh: delete an earlier run in `output` first.
        prompts: held-out prompts, two seeds each.

    Raises:
        UserError: when `output` holds something else, or the embedded models are missing.
    """
    console = Console()
    for name in assets.NAMES:
        assets.path(name)  # fail before any work
    settings = {"seed": seed, "updates": updates, "prompts": prompts}
    output = _prepare(Path(output), settings, fresh)
    with _spent(output / "spent.json"):
        lora, summary = _stages(output, console, seed, updates, prompts)
    console.print("[bold]5/5[/] report")
    summary |= json.loads((output / "spent.json").read_text())
    atomic_write_json(output / "summary.json", summary)
    report = build_report(output)
    _say(console, summary, report, lora)
    return report


def _stages(
    output: Path, console: Console, seed: int, updates: int | None, prompts: int
) -> tuple[Path, dict[str, Any]]:
    """Samples, training, samples, measurements: the LoRA and the summary but for the times."""
    asked = sample_prompts(prompts, PROMPT_SEED, split="demo")
    options: dict[str, Any] = {
        "seeds": SEEDS, "num_steps": STEPS, "guidance_scale": GUIDANCE, "save_latents": True, "device": "cpu"
    }  # fmt: skip
    console.print(f"[bold]1/5[/] base model: {len(asked)} held-out prompts x {len(SEEDS)} seeds")
    generate_videos(asked, output / "base", arm="base", **options)
    console.print("[bold]2/5[/] GRPO on rewards read from latents")
    overrides = [f"output={output / 'train'}", f"seed={seed}"] + ([] if updates is None else [f"updates={updates}"])
    config = load_config("tiny", overrides)
    lora = train(config)
    console.print("[bold]3/5[/] tuned model: the same prompts and seeds")
    generate_videos(asked, output / "tuned", arm="tuned", lora=lora, **options)
    console.print("[bold]4/5[/] evaluation")
    rows = {arm: _measure(output, arm, config) for arm in ARMS}
    kernel = compare_quality(output / "base" / "manifest.jsonl", output / "tuned" / "manifest.jsonl")
    metrics = summarise(rows["base"], rows["tuned"], kernel=kernel)
    motion = metrics.get("motion_flow", {})
    audit = assets.path("lgm") / "audit.json"
    if audit.is_file():  # the report says whether the reward is signal
        shutil.copyfile(audit, output / "audit.json")
    return lora, {
        "prompts": len(asked),
        "seeds": list(SEEDS),
        "motion_ratio": motion["tuned"] / motion["base"] if motion.get("base") else None,
        "metrics": metrics,
    }


@contextmanager
def _spent(path: Path) -> Iterator[None]:
    """Adds the time of this call to that of earlier ones, interrupted ones too."""
    began, cpu = time.time(), time.process_time()
    before = json.loads(path.read_text()) if path.exists() else {"seconds": 0.0, "cpu_seconds": 0.0}
    try:
        yield
    finally:
        now = {"seconds": time.time() - began, "cpu_seconds": time.process_time() - cpu}
        atomic_write_json(path, {name: round(before[name] + now[name], 1) for name in now})


def _prepare(output: Path, settings: dict[str, Any], fresh: bool) -> Path:
    """The run's directory; refuses one that another demo (or something else) lives in."""
    marker = output / "demo.json"
    if output.is_dir() and any(output.iterdir()) and not marker.exists():
        raise UserError(f"{output} is not empty and holds no demo; name another --output")
    if fresh and marker.exists():
        shutil.rmtree(output)
    if marker.exists() and json.loads(marker.read_text()) != settings:
        raise UserError(f"{output} holds a demo with {json.loads(marker.read_text())}; use --fresh or another --output")
    ensure_directory(output)
    atomic_write_json(marker, settings)
    return output


def _measure(output: Path, arm: str, config: TrainConfig) -> list[dict[str, Any]]:
    """Rows of `eval/ARM/metrics.jsonl`: the metrics of every video, and the two rewards of its latents; the 3D scenes
    beside them."""
    evaluate_manifest(output / arm / "manifest.jsonl", output / "eval" / arm, "fast")
    return score_latents(output, arm, options=audited_options(config.rewards))


def _say(console: Console, summary: dict[str, Any], report: Path, lora: Path) -> None:
    """The result in a few lines; an improvement is called one only when its interval leaves zero."""
    console.print(f"{summary['prompts']} prompts x {len(summary['seeds'])} seeds, {summary['seconds']:.0f} s")
    shown = (
        "motion_reward",
        "geometry_reward",
        "epipolar_inliers",
        "judge_reprojection",
        "adherence",
        "kernel_distance",
    )
    for name in shown:
        if name in summary["metrics"]:
            m = summary["metrics"][name]
            low, high = m["ci_low"], m["ci_high"]
            if low is None or high is None or low <= 0 <= high:
                word = "no clear change"
            else:
                word = "better" if (m["diff"] > 0) == m["higher_is_better"] else "worse"
            interval = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
            console.print(f"  {name:20s} {m['base']:.4f} -> {m['tuned']:.4f}  {m['diff']:+.4f}{interval}  {word}")
    if summary["motion_ratio"] is not None:
        console.print(f"  motion, tuned / base  {summary['motion_ratio']:.2f}")
    console.print(f"LoRA: {lora}\nReport: {report}")
