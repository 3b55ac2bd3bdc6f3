"""Run a recipe: train its arms, generate the same prompts and seeds with each, evaluate, compare with the base model.

    OUTPUT/runs/ARM-sN       training runs, one a seed
    OUTPUT/SET/ARM-sN        videos and their latents
    OUTPUT/SET/eval/ARM-sN   metrics of every video
    OUTPUT/TABLE.{json,md,png}

Everything goes through the functions behind `train`, `generate`, `evaluate` and `compare`, each of which keeps what it
finished, so a second call goes on where the first one stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vggrpo.config import EMBEDDED, TrainConfig, load_config
from vggrpo.errors import UserError
from vggrpo.evaluation import compare, compare_quality, evaluate_manifest, summarise_comparison, verdict
from vggrpo.evaluation.benchmarks import load_prompt_sets
from vggrpo.evaluation.latent_scores import REWARDS, score_latents
from vggrpo.io.atomic import atomic_write_json, ensure_directory
from vggrpo.io.manifest import read_jsonl
from vggrpo.io.prompts import read_prompts
from vggrpo.models.loading import pick_device
from vggrpo.posttraining import train
from vggrpo.posttraining.trainer import load_lgm
from vggrpo.reproduce.recipes import STUDIES, TABLES, Arm, Table, equal_budget
from vggrpo.reproduce.results import machine, write_results
from vggrpo.rewards.latent import WeightedLatentReward
from vggrpo.sampling.generate import generate_videos
from vggrpo.sampling.guidance import RewardGuidance
from vggrpo.sampling.steering import Steering

Row = dict[str, Any]
GUIDING = {"camera_motion_smoothness": 1.0, "geometry_reprojection_consistency": 1.0}
BASE = Arm("base", "the untouched model")
# The smallest run of every algorithm.
_QUICK = (
    "updates=1", "data.num_prompts=2", "sampling.num_steps=3", "sampling.window=1", "sampling.window_last=null",
    "grpo.prompts_per_update=1", "grpo.samples_per_prompt=2", "grpo.base_travel_samples=1",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How large a reproduction is.

    Attributes:
        config: training recipe.
        seeds: training runs per arm.
        prompts: at most so many of each prompt set.
        videos: videos per prompt and model.
        steps: denoising steps.
        guidance_scale: classifier-free guidance.
        updates: of GRPO; None: the recipe's. The rivals get the same number of videos.
        device: of everything.
        overrides: config fields of all trainings, such as `lgm.path=DIR`.
        sets: prompt sets; empty: those of the table.
        quick: the smallest sizes: shows that the recipe runs, and nothing else.
    """

    config: str = "tiny"
    seeds: int = 3
    prompts: int = 96
    videos: int = 2
    steps: int = 20
    guidance_scale: float = 3.0
    updates: int | None = None
    device: str = "auto"
    overrides: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    quick: bool = False

    def smallest(self) -> Settings:
        """The quick version."""
        return replace(self, seeds=1, prompts=2, videos=1, steps=3, quick=True)


def reproduce(
    names: Sequence[str],
    output: Path | str,
    settings: Settings | None = None,
    *,
    arms: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Run recipes and write their results.

    Args:
        names: of `TABLES` and `STUDIES`.
        output: directory; what it holds of an interrupted reproduction is used.
        settings: sizes.
        arms: only these arms (empty: all).
        say: gets one line a step.

    Returns:
        The Markdown files.

    Raises:
        UserError: for unknown names, or a directory that holds a reproduction with other settings.
    """
    settings = settings or Settings()
    known = [*TABLES, *STUDIES]
    for name in names:
        if name not in known:
            raise UserError(f"no table {name!r}; there are {', '.join(known)}")
    unknown = set(arms) - {arm.name for name in names if name in TABLES for arm in TABLES[name].arms}
    if unknown:
        raise UserError(f"no arm {sorted(unknown)[0]!r} in {', '.join(names)}")
    folder = ensure_directory(output)
    _check_settings(folder / "settings.json", settings)
    return [
        _study(name, folder, settings) if name in STUDIES else _table(name, TABLES[name], folder, settings, arms, say)
        for name in names
    ]


def arm_config(arm: Arm, settings: Settings, folder: Path, seed: int) -> TrainConfig:
    """The training config of an arm; rivals get the budget of the GRPO recipe."""
    assert arm.train is not None
    size = [] if settings.updates is None else [f"updates={settings.updates}"]
    common = [f"output={folder / 'runs' / f'{arm.name}-s{seed}'}", f"seed={seed}", f"model.device={settings.device}"]
    overrides = [*size, *(_QUICK if settings.quick else ()), *settings.overrides, *arm.train, *common]
    config = load_config(settings.config, overrides)
    embedded = config.data.prompts == EMBEDDED or not Path(config.data.prompts).is_file()
    prompts = config.data.num_prompts if embedded else len(read_prompts(config.data.prompts))
    return load_config(settings.config, [*overrides, *equal_budget(config, prompts, arm.group)])


def _table(
    name: str, table: Table, folder: Path, settings: Settings, only: Sequence[str], say: Callable[[str], None]
) -> Path:
    chosen = [arm for arm in table.arms if not only or arm.name in only]
    result: dict[str, Any] = {
        "table": name, "title": table.title, "claim": table.claim, "settings": asdict(settings), "machine": machine(),
        "arms": {arm.name: {"about": arm.about} for arm in chosen}, "sets": {},
    }  # fmt: skip
    for prompt_set in settings.sets or table.sets:
        base = _measured(BASE, 0, prompt_set, folder, settings, say)
        rows: dict[str, Any] = {}
        for arm in chosen:
            runs = [_measured(arm, s, prompt_set, folder, settings, say) for s in range(_runs(arm, settings))]
            rows[arm.name] = _compared(arm, base, runs, prompt_set, folder, settings)
        result["sets"][prompt_set] = rows
    for arm in chosen:
        result["arms"][arm.name] |= _spent(arm, folder, settings)
    return write_results(folder, name, result)


def _runs(arm: Arm, settings: Settings) -> int:
    """Training seeds of an arm; what is not trained has no training seed."""
    return settings.seeds if arm.train is not None or arm.lora_of else 1


def _trained(arm: Arm, seed: int, folder: Path, settings: Settings, say: Callable[[str], None]) -> Path | None:
    """The LoRA of an arm, trained if it is not there yet."""
    if arm.lora_of:
        owner = next(other for table in TABLES.values() for other in table.arms if other.name == arm.lora_of)
        return _trained(owner, seed, folder, settings, say)
    if arm.train is None:
        return None
    say(f"train {arm.name}, seed {seed}")
    return train(arm_config(arm, settings, folder, seed), progress=not settings.quick)


def _measured(
    arm: Arm, seed: int, prompt_set: str, folder: Path, settings: Settings, say: Callable[[str], None]
) -> list[Row]:
    """Metrics rows of an arm's videos for one training seed, with the two rewards of their latents."""
    lora = _trained(arm, seed, folder, settings, say)
    prompts = [prompt.text for prompt in load_prompt_sets([prompt_set], settings.prompts)]
    run_dir, name = folder / prompt_set, f"{arm.name}-s{seed}"
    say(f"generate and evaluate {prompt_set}/{name}")
    config = load_config(settings.config, settings.overrides)
    manifest = generate_videos(
        prompts,
        run_dir / name,
        pipeline=config.model.path,
        lora=lora,
        arm=arm.name,
        seeds=range(settings.videos),
        num_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        num_frames=config.data.num_frames,
        size=(config.data.height, config.data.width),
        device=settings.device,
        dtype=config.model.dtype,
        save_latents=True,
        steering=_steering(arm, config, settings),
    )
    rows = read_jsonl(evaluate_manifest(manifest, run_dir / "eval" / name, "fast"))
    if all(REWARDS.keys() <= row["metrics"].keys() for row in rows):
        return rows
    return score_latents(run_dir, name, config.lgm.path, pick_device(settings.device))


def _steering(arm: Arm, config: TrainConfig, settings: Settings) -> Steering | None:
    if not arm.guidance and arm.candidates == 1:
        return None
    reward = WeightedLatentReward(load_lgm(config.lgm.path, pick_device(settings.device)), GUIDING)
    every = max(1, settings.steps * 2 // 5)  # the paper's share: steps 20 and 40 of 50
    guidance = RewardGuidance(reward, arm.guidance, every=every, detach_velocity=arm.detach)
    return Steering(reward, "motion + geometry", guidance, arm.candidates)


def _compared(
    arm: Arm, base: list[Row], runs: list[list[Row]], prompt_set: str, folder: Path, settings: Settings
) -> dict[str, Any]:
    """The arm against the base model. Training seeds are seeds of the pair, so that they are averaged in a prompt."""
    tuned_rows = [row | {"seed": 1000 * s + row["seed"]} for s, rows in enumerate(runs) for row in rows]
    base_rows = [row | {"seed": 1000 * s + row["seed"]} for s in range(len(runs)) for row in base]
    comparison = compare(base_rows, tuned_rows)
    manifests = [folder / prompt_set / name / "manifest.jsonl" for name in ("base-s0", f"{arm.name}-s0")]
    kernel = compare_quality(manifests[0], manifests[1], reference=8 if settings.quick else 96)
    judged = verdict(comparison, kernel)
    return {
        "metrics": summarise_comparison(comparison, kernel),
        "motion_ratio": comparison.motion_ratio,
        "training_seeds": len(runs),
        "counts": judged.counts,
        "checks": {name: {"outcome": outcome, "about": text} for name, (outcome, text) in judged.checks.items()},
    }


def _spent(arm: Arm, folder: Path, settings: Settings) -> dict[str, Any]:
    """Budgets: videos and seconds of training (mean of the seeds), and what one video costs to sample."""
    logs = [folder / "runs" / f"{arm.name}-s{s}" / "log.jsonl" for s in range(_runs(arm, settings))]
    rows = [read_jsonl(log) for log in logs if log.is_file()]
    out: dict[str, Any] = {}
    if rows:
        out["training_videos"] = sum(sum(row.get("videos") or 0 for row in run) for run in rows) / len(rows)
        out["training_seconds"] = sum(sum(row["seconds/total"] for row in run) for run in rows) / len(rows)
    costs = sorted(folder.glob(f"*/{arm.name}-s0/{arm.name}/cost.json"))
    if costs:
        cost = json.loads(costs[0].read_text())
        out["sampling"] = {key: value for key, value in cost.items() if key.endswith(("per_video", "device"))}
    return out


def _study(name: str, folder: Path, settings: Settings) -> Path:
    """Efficiency and robustness: what `vggrpo analyze-lgm` measures."""
    from vggrpo.evaluation.lgm_analysis import analyze_lgm

    config = load_config(settings.config, settings.overrides)
    parts = {"efficiency": ["cost"] if settings.quick else ["cost", "full-shape"], "robustness": ["noise"]}[name]
    found = analyze_lgm(
        config.lgm.path,
        folder / name,
        video_model=config.model.path,
        clips=1 if settings.quick else 32,
        num_frames=config.data.num_frames,
        size=(config.data.height, config.data.width),
        parts=parts,
        device=settings.device,
    )
    result = {
        "table": name, "title": STUDIES[name], "settings": asdict(settings), "machine": machine(), "found": found
    }  # fmt: skip
    return write_results(folder, name, result)


def _check_settings(path: Path, settings: Settings) -> None:
    """Results of other settings in the same place are an error, not a mixture."""
    values = json.loads(json.dumps(asdict(settings)))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key, value in values.items():
            if before.get(key) != value:
                raise UserError(
                    f"{path.parent} holds a reproduction with {key} {before.get(key)!r}, not {value!r}; "
                    "name another --output"
                )
        return
    atomic_write_json(path, values)
