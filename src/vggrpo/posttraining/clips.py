"""Clips that are made once, before the first update, and kept as latents in `OUTPUT/clips`: filtered ones for SFT,
candidates for preference pairs. An interrupted preparation goes on with the prompts that are missing.

`settings.json` beside them says what they follow from; with other settings they are refused, never trained on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from vggrpo.config import TrainConfig
from vggrpo.config_algorithms import least_micro_batch
from vggrpo.config_loading import flatten_config
from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_path, atomic_write_json, ensure_directory
from vggrpo.io.manifest import ManifestRow, read_manifest
from vggrpo.io.video import read_video
from vggrpo.posttraining.advantage import asked_rewards, group_advantages, judged_samples
from vggrpo.posttraining.algorithm import Context
from vggrpo.posttraining.batches import measure_base_motion, sample_clips
from vggrpo.posttraining.scoring import reward_weights, score_latents
from vggrpo.posttraining.watch import BaseMotion
from vggrpo.sampling.seeds import derive_seed


@dataclass(frozen=True)
class Clips:
    """Stored clips with their prompts."""

    files: list[Path]
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, places: Sequence[int], device: torch.device) -> tuple[Float[Tensor, "B C T H W"], list[str]]:
        """Latents and prompts of some of them."""
        latents = [load_file(self.files[place])["latents"] for place in places]
        return torch.stack(latents).to(device), [self.prompts[place] for place in places]


def clip_folder(context: Context) -> Path:
    """Where the run keeps its clips."""
    return ensure_directory(Path(context.config.output) / "clips")


def clip_settings(config: TrainConfig, prompts: Sequence[str]) -> dict[str, Any]:
    """What the stored clips follow from, by the config's dotted names, and fingerprints of the lists that they name.

    What only decides which of the stored clips are trained on, how, or in which pieces, is not among them.
    """
    names = ["algorithm", "seed", "model.path", "model.dtype", "data.num_frames", "data.height", "data.width",
             "data.first_frames", "sampling.num_steps", "sampling.shift", "sampling.guidance_scale"]  # fmt: skip
    lists = {"prompts": list(prompts)}
    if config.algorithm == "sft" and config.sft.videos is not None:
        names += ["sft.videos"]
        lists["rows of sft.videos"] = [f"{row.path}\t{row.prompt}" for row in manifest_rows(config.sft.videos)[0]]
    elif config.algorithm == "sft":
        names += ["sft.candidates", "sft.keep"]
    else:
        names += [f"dpo.{name}" for name in ("pairs", "candidates", "pairs_per_prompt", "min_gap", "min_motion")]
        names += {"epipolar": ["dpo.fps"], "geometry": ["reward.geometry", "reward.view_stride"]}.get(
            config.dpo.pairs, []
        )
    if config.algorithm == "sft" or config.dpo.pairs == "latent":  # the configured rewards choose
        names += ["rewards", "reward", "lgm.path", "grpo.mode", "grpo.base_travel_samples"]
    flat = flatten_config(config.model_dump(mode="json"))
    chosen = {key: value for key, value in flat.items() if any(key == n or key.startswith(f"{n}.") for n in names)}
    return chosen | {name: hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] for name, lines in lists.items()}


def claim_folder(context: Context) -> Path:
    """The folder of the clips, with the settings that its clips have, or will have. All processes take part.

    Raises:
        UserError: when it holds clips of other settings, or of settings that are not known.
    """
    folder, settings = clip_folder(context), clip_settings(context.config, context.prompts)
    file = folder / "settings.json"
    if any(folder.glob("prompt-*.json")):
        _refuse_others(file, settings)
    elif context.processes.is_main:  # no prompt is done, as after a call that failed: any settings will do
        atomic_write_json(file, settings)
    context.processes.barrier()  # no process makes a clip before all have looked
    return folder


def _refuse_others(file: Path, settings: dict[str, Any]) -> None:
    remedy = f"delete {file.parent}, and they are made anew, or set another output=DIR"
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file.parent} holds clips, and no {file.name} says what they were made with; {remedy}"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{file} is damaged, so nothing says what the clips beside it were made with; {remedy}"
        ) from error
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{file.parent} holds clips of other settings ({name}: was {before.get(name)!r}, is "
                f"{settings.get(name)!r}); undo the change, or {remedy}"
            )


def save_latents(path: Path, **tensors: Float[Tensor, "C T H W"]) -> None:
    """Write latents, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, str(temporary))


def base_candidates(context: Context, count: int) -> Iterator[tuple[int, str, Float[Tensor, "K C T H W"]]]:
    """`count` clips of the base model for every prompt that has no `prompt-N.json` yet, this process's share of them.

    The caller writes that file when it is done with the prompt.

    Raises:
        UserError: when there are clips of other settings already; see `claim_folder`.
    """
    folder, distinct = claim_folder(context), list(dict.fromkeys(context.prompts))
    mine = [(i, prompt) for i, prompt in enumerate(distinct) if i % context.processes.size == context.processes.rank]
    todo = [(i, prompt) for i, prompt in mine if not prompt_file(folder, i).is_file()]
    together = max(1, least_micro_batch(context.config.sampling.micro_batch) // count)  # prompts
    for start in range(0, len(todo), together):
        _go_on(context)
        part = todo[start : start + together]
        jobs = [
            (prompt, derive_seed(context.config.seed, "clip", prompt, k)) for _, prompt in part for k in range(count)
        ]
        with context.policy.reference():
            latents = sample_clips(context, [prompt for prompt, _ in jobs], [seed for _, seed in jobs])
        for (i, prompt), clips in zip(part, latents.split(count), strict=True):
            yield i, prompt, clips


def _go_on(context: Context) -> None:
    """Making clips takes minutes and is one update to the trainer.

    Raises:
        KeyboardInterrupt: the run should end; what is made is kept.
    """
    if context.stop.is_set():
        raise KeyboardInterrupt("stopped before all clips were made; run again to go on")


def prompt_file(folder: Path, number: int) -> Path:
    """What is known about prompt `number`; being there, it says that the prompt is done."""
    return folder / f"prompt-{number:05d}.json"


def read_prompt_files(folder: Path) -> list[dict[str, Any]]:
    """All of them, in their order."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("prompt-*.json"))]


def best_clips_of_base(context: Context) -> Clips:
    """The best `sft.keep` of each prompt's `sft.candidates` clips of the base model, by the configured rewards."""
    settings, folder = context.config.sft, clip_folder(context)
    count = max(1, math.ceil(settings.keep * settings.candidates))
    for number, prompt, latents in base_candidates(context, settings.candidates):
        merit, valid, values = clip_merit(context, latents, [prompt] * len(latents))
        order = [k for k in merit.argsort(descending=True, stable=True).tolist() if valid[k]][:count]
        names = [f"clip-{number:05d}-{k:03d}.safetensors" for k in order]
        for k, name in zip(order, names, strict=True):
            save_latents(folder / name, latents=latents[k])
        atomic_write_json(prompt_file(folder, number), {"prompt": prompt, "files": names, "rewards": values})
    context.processes.barrier()
    rows = read_prompt_files(folder)
    return _not_empty([(folder / name, row["prompt"]) for row in rows for name in row["files"]])


def clips_of_videos(context: Context, source: str) -> Clips:
    """The best `sft.keep` of the videos of a manifest or folder, encoded, by the configured rewards.

    A reward that no video of a prompt has does not apply to the prompt: it is as good as the mean of all videos there.
    """
    folder, config = claim_folder(context), context.config
    rows, root = manifest_rows(source)
    for number in range(context.processes.rank, len(rows), context.processes.size):
        _go_on(context)
        if prompt_file(folder, number).is_file():
            continue
        video = fitted_video(root / rows[number].path, config.data.num_frames, (config.data.height, config.data.width))
        with torch.no_grad():
            latents = context.model.encode_video(video[None].to(context.model.device))
        _, valid, values = clip_merit(context, latents, [rows[number].prompt])
        name = f"clip-{number:05d}.safetensors"
        save_latents(folder / name, latents=latents[0])
        atomic_write_json(
            prompt_file(folder, number),
            {"prompt": rows[number].prompt, "files": [name] if bool(valid[0]) else [], "rewards": values},
        )
    context.processes.barrier()
    done = [row for row in read_prompt_files(folder) if row["files"]]
    if not done:
        return _not_empty([])
    values = torch.tensor([[_number(row["rewards"][name][0]) for row in done] for name in config.rewards])
    numbers = {prompt: place for place, prompt in enumerate(dict.fromkeys(row["prompt"] for row in done))}
    by_prompt = torch.tensor([numbers[row["prompt"]] for row in done])
    asked = asked_rewards(values.isfinite(), by_prompt, reward_weights(config.rewards))
    judged = judged_samples(values.isfinite(), asked)
    merit = _merit(context, values, asked)
    order = [k for k in merit.argsort(descending=True, stable=True).tolist() if judged[k]]
    best = sorted(order[: max(1, math.ceil(config.sft.keep * len(order)))])
    return _not_empty([(folder / done[k]["files"][0], done[k]["prompt"]) for k in best])


@torch.no_grad()
def clip_merit(
    context: Context, latents: Float[Tensor, "K C T H W"], prompts: Sequence[str]
) -> tuple[Float[Tensor, " K"], Tensor, dict[str, list[float | None]]]:
    """How good each clip is among these (normalised rewards, averaged), whether it could be judged by all rewards that
    have a say among them, and the raw rewards by name."""
    assert context.lgm is not None
    base: dict[str, BaseMotion] = {}
    measure_base_motion(context, prompts, base)
    config = context.config
    scores = score_latents(
        context.lgm, latents, config.rewards, prompts=prompts, base=base, micro_batch=config.lgm.micro_batch
    )
    values, valid = scores.values.cpu(), scores.valid.cpu()
    values = torch.where(valid, values, torch.nan)
    asked = asked_rewards(valid, _one_group(values), reward_weights(config.rewards))
    merit = _merit(context, values, asked)
    raw = {name: [v if ok else None for v, ok in zip(row, good, strict=True)]
           for name, row, good in zip(config.rewards, values.tolist(), valid.tolist(), strict=True)}  # fmt: skip
    return merit, judged_samples(valid, asked), raw


def manifest_rows(source: str) -> tuple[list[ManifestRow], Path]:
    """Rows of a manifest, or of a folder that holds `manifest.jsonl`, and what their paths are relative to."""
    path = Path(source) / "manifest.jsonl" if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise UserError(f"sft.videos: no manifest at {path}; each line needs path, prompt, seed, fps and arm")
    return read_manifest(path), path.parent


def fitted_video(path: Path, num_frames: int, size: tuple[int, int]) -> Float[Tensor, "3 T H W"]:
    """The first `num_frames` frames of a video in [0, 1], cut to the aspect of `size` around the centre and resized.

    Raises:
        UserError: when the video is too short.
    """
    frames, _ = read_video(path, max_frames=num_frames)
    if len(frames) < num_frames:
        raise UserError(f"{path} has {len(frames)} frames, and data.num_frames is {num_frames}; leave it out")
    video = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).float() / 255  # (T, 3, H, W)
    height, width = video.shape[-2:]
    cut_h, cut_w = min(height, round(width * size[0] / size[1])), min(width, round(height * size[1] / size[0]))
    top, left = (height - cut_h) // 2, (width - cut_w) // 2
    video = video[:, :, top : top + cut_h, left : left + cut_w]
    if video.shape[-2:] != size:
        video = functional.interpolate(video, size, mode="bilinear", antialias=True, align_corners=False)
    return video.clamp(0, 1).transpose(0, 1)


def _merit(context: Context, values: Float[Tensor, "R N"], asked: Bool[Tensor, "R N"]) -> Float[Tensor, " N"]:
    """Normalised rewards, averaged, of clips that are compared with each other; NaN is invalid."""
    weights, mode = reward_weights(context.config.rewards), context.config.grpo.mode
    return group_advantages(values, _one_group(values), weights=weights, mode=mode, asked=asked)


def _one_group(values: Float[Tensor, "R N"]) -> Int[Tensor, " N"]:
    return torch.zeros(values.shape[1], dtype=torch.long)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _not_empty(found: list[tuple[Path, str]]) -> Clips:
    if not found:
        raise UserError("no clip has valid rewards: there is nothing to train on; see the files in OUTPUT/clips")
    return Clips([file for file, _ in found], [prompt for _, prompt in found])
