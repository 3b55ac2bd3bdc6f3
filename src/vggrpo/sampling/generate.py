"""Videos from prompts with any Wan pipeline, with or without a LoRA, for people and for evaluation.

The pipeline's own deterministic solver is used, so plain diffusers with
`generator=torch.Generator("cpu").manual_seed(video_seed(i, s))`
gives the same frames. The initial noise follows from the prompt's place and the seed alone: base and tuned arms form
pairs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.io.atomic import atomic_path, atomic_write_json, ensure_directory
from vggrpo.io.images import read_image
from vggrpo.io.manifest import ManifestRow, read_manifest, write_manifest
from vggrpo.io.video import write_video
from vggrpo.models.base import VideoModel
from vggrpo.models.loading import load_video_model
from vggrpo.models.lora import FULL_WEIGHTS_NAME, load_tuned
from vggrpo.sampling.first_frame import pin_first_frame
from vggrpo.sampling.guidance import RewardGuidance
from vggrpo.sampling.rollout import guided_velocity
from vggrpo.sampling.seeds import derive_seed, seeded_noise
from vggrpo.sampling.steering import Steering, add_cost, append_choices


def video_seed(index: int, seed: int) -> int:
    """Seed of the initial noise of prompt `index` (its place in the list) under `seed`."""
    return derive_seed("video", index, seed)


@torch.no_grad()
def generate_videos(
    prompts: Sequence[str],
    output: Path | str,
    *,
    pipeline: str | Path = "embedded",
    lora: str | Path | None = None,
    arm: str | None = None,
    seeds: Iterable[int] = (0,),
    num_steps: int = 50,
    guidance_scale: float = 1.0,
    num_frames: int = 17,
    size: tuple[int, int] = (64, 64),
    fps: float = 8.0,
    micro_batch: int = 8,
    device: str = "auto",
    dtype: str = "float32",
    save_latents: bool = False,
    steering: Steering | None = None,
    first_frames: Sequence[Path | str] | None = None,
) -> Path:
    """Write `OUTPUT/ARM/*.mp4` and list them in `OUTPUT/manifest.jsonl`; files that are there already are not made
    again.

    Args:
        prompts, seeds: one or more; one video a prompt and seed.
        output: directory; may hold other arms already.
        pipeline: directory or hub id; "embedded" is the shipped one.
        lora: LoRA file or directory, or the directory of a whole transformer that training exported.
        arm: name in the manifest; default "tuned" with a LoRA, else "base".
        num_steps, guidance_scale: denoising steps; classifier-free guidance against the empty prompt, 1 = none.
        num_frames, size, fps: 4n+1 frames of (height, width) pixels; frames per second in the file.
        micro_batch, device, dtype: videos at once; "auto", "cpu", "cuda", ...; of transformer and text encoder.
        save_latents: also write the normalised latents, `*.safetensors` with the key `latents`, (C, T', H', W').
        steering: guidance by a latent reward, or the best of several candidates; None is plain sampling. What a video
            cost is in `OUTPUT/ARM/cost.json` either way.
        first_frames: an image for each prompt that its videos start from (Wan2.2-TI2V); None: text to video.

    Returns the manifest.
    """
    if not prompts:
        raise UserError("there is no prompt; give at least one")
    arm, seeds = arm or ("tuned" if lora is not None else "base"), list(seeds)
    if Path(arm).name != arm or arm == "..":
        raise UserError(f"the arm {arm!r} is no name of a directory in {output}; use one without '/'")
    if steering is not None and steering.guidance is not None:
        steering.guidance.check_steps(num_steps)  # before anything is written or loaded
    folder = ensure_directory(Path(output) / arm)
    made_by = {"num_steps": num_steps, "guidance_scale": guidance_scale, "num_frames": num_frames, "size": list(size),
               "fps": fps, "dtype": dtype}  # fmt: skip
    _check_settings(folder / "settings.json", made_by | _sources(pipeline, lora, steering, first_frames))
    wanted = [(i, seed, folder / f"{_stem(i, prompt, seed)}.mp4") for i, prompt in enumerate(prompts) for seed in seeds]
    missing = [job for job in wanted if not _is_done(job[2], save_latents)]
    if missing:
        model = _load(pipeline, lora, device, dtype)
        shape = model.latent_spec.latent_shape(num_frames, *size)
        options: dict[str, Any] = {"shape": shape, "num_steps": num_steps, "guidance_scale": guidance_scale}
        for jobs in _batches(missing, micro_batch):
            options["first_frame"] = _first_latents(model, first_frames, [i for i, _, _ in jobs], size)
            named = [(prompts[i], video_seed(i, seed), path) for i, seed, path in jobs]
            _make(model, named, folder, options, steering, fps, save_latents)
    rows = [ManifestRow(f"{arm}/{path.name}", prompts[i], seed, fps, arm) for i, seed, path in wanted]
    return _write_rows(Path(output) / "manifest.jsonl", rows, arm)


def _load(pipeline: str | Path, lora: str | Path | None, device: str, dtype: str) -> VideoModel:
    model = load_video_model(pipeline, device=device, dtype=dtype)
    if lora is not None:
        load_tuned(model.transformer, lora, model.pipeline)
    return model


def _sources(
    pipeline: str | Path, lora: str | Path | None, steering: Steering | None, first_frames: Sequence[Path | str] | None
) -> dict[str, Any]:
    """Which weights, reward and images decide the videos."""
    return {
        "pipeline": str(pipeline),
        "lora": None if lora is None else _digest(lora),
        **({"guidance": None, "best_of": None} if steering is None else steering.settings()),
        "first_frames": None if first_frames is None else [_file_digest(Path(file)) for file in first_frames],
    }


def _make(
    model: VideoModel,
    jobs: Sequence[tuple[str, int, Path]],
    folder: Path,
    options: dict[str, Any],
    steering: Steering | None,
    fps: float,
    save_latents: bool,
) -> None:
    """Sample and write one batch of (prompt, seed of the noise, file), and add it to the arm's cost."""
    began = time.perf_counter()
    prompts, seeds = [prompt for prompt, _, _ in jobs], [seed for _, seed, _ in jobs]
    if steering is None:
        latents = solve(model, prompts, seeds=seeds, **options)
    else:
        guided = options | {"guidance": steering.guidance}
        latents, rewards = steering.sample(lambda noise: solve(model, prompts, seeds=noise, **guided), seeds, prompts)
        if rewards is not None:
            append_choices(folder / "candidates.jsonl", [path.name for _, _, path in jobs], prompts, rewards)
    for (_, _, path), latent in zip(jobs, latents, strict=True):
        _write(model, path, latent, fps, save_latents)
    add_cost(
        folder / "cost.json",
        len(jobs),
        time.perf_counter() - began,
        num_steps=options["num_steps"],
        passes=1 if options["guidance_scale"] == 1 else 2,
        steering=steering,
        device=str(model.device),
    )


@torch.no_grad()
def solve(
    model: VideoModel,
    prompts: Sequence[str],
    *,
    shape: Sequence[int],
    seeds: Sequence[int],
    num_steps: int,
    guidance_scale: float = 1.0,
    guidance: RewardGuidance | None = None,
    text: Float[Tensor, "B L D"] | None = None,
    negative_text: Float[Tensor, "1 L D"] | None = None,
    first_frame: Float[Tensor, "B C 1 H W"] | None = None,
) -> Float[Tensor, "B C T H W"]:
    """Clean latents by the pipeline's own solver (diffusers scheduler), as the plain pipeline makes them; with
    `guidance`, steered by a latent reward.

    Args:
        model: the video model.
        prompts: one a video.
        shape: (C, T', H', W') of the latents.
        seeds: of the initial noise, one a video.
        num_steps: denoising steps.
        guidance_scale: classifier-free guidance against the empty prompt, 1 = none.
        text: embeddings of `prompts`, where they are at hand.
        negative_text: embedding of the empty prompt, where it is at hand.
        guidance: steer by a latent reward, None: not.
        first_frame: the given first latent frame (image to video), None: none.

    Raises:
        UserError: when the network puts out NaN or infinity, or `guidance` would guide no step.
    """
    if guidance is not None:
        guidance.check_steps(num_steps)
    text = model.encode_prompt(prompts) if text is None else text
    negative = negative_text
    if guidance_scale != 1 and negative is None:
        negative = model.encode_prompt([""])
    latents = pin_first_frame(seeded_noise(seeds, shape, model.device), first_frame)
    solver = model.solver(num_steps)
    for step, timestep in enumerate(solver.timesteps):
        t = (timestep.float() / 1000).expand(len(latents))
        predict = partial(
            guided_velocity,
            model,
            t=t,
            text=text,
            guidance_scale=guidance_scale,
            negative_text=negative,
            pinned=first_frame is not None,
        )
        if guidance is not None and guidance.acts(step):
            velocity = guidance.velocity(predict, latents, t, prompts)
        else:
            velocity = predict(latents)
        latents = pin_first_frame(solver.step(velocity, timestep, latents, return_dict=False)[0], first_frame)
    if not bool(torch.isfinite(latents).all()):
        raise UserError(
            "the sampled latents are not finite: the weights or the LoRA are broken, or the number format is too narrow"
        )
    return latents


def _write(model: VideoModel, path: Path, latents: Float[Tensor, "C T H W"], fps: float, save_latents: bool) -> None:
    """The video goes last: where it is, all of it is."""
    if save_latents:
        from safetensors.torch import save_file

        with atomic_path(path.with_suffix(".safetensors")) as temporary:
            save_file({"latents": latents.cpu().contiguous()}, str(temporary))
    write_video(path, model.decode(latents[None])[0], fps)


@torch.no_grad()
def _first_latents(
    model: VideoModel, files: Sequence[Path | str] | None, chosen: Sequence[int], size: tuple[int, int]
) -> Float[Tensor, "B C 1 H W"] | None:
    if files is None:
        return None
    images = torch.stack([read_image(files[i], size) for i in chosen])  # (B, 3, H, W)
    return model.encode_video(images[:, :, None])


def _is_done(path: Path, save_latents: bool) -> bool:
    return path.is_file() and (not save_latents or path.with_suffix(".safetensors").is_file())


def _stem(index: int, prompt: str, seed: int) -> str:
    """A file name that another prompt at the same place does not share."""
    return f"{index:04d}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}-{seed}"


def _digest(lora: str | Path) -> str:
    """Checksum of the LoRA's weights: the same path may hold another LoRA tomorrow."""
    path = Path(lora)
    files = [path]
    if path.is_dir():
        whole = path / FULL_WEIGHTS_NAME
        files = [whole] if whole.is_file() else sorted(path.rglob("*lora*.safetensors"))
    files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(f"no LoRA at {lora}; give a .safetensors file or a run's directory")
    return _file_digest(files[0])


def _file_digest(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Videos of other settings in the same place are an error, not a mixture. Where there is no video yet, as after
    a call that failed, any settings will do."""
    if path.is_file() and any(path.parent.glob("*.mp4")):
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged; delete its directory to start afresh") from error
        for key, value in settings.items():
            if before.get(key) != value:
                raise UserError(
                    f"{path.parent} holds videos with {key} {before.get(key)!r}, not {value!r}; "
                    "name another --output or --arm"
                )
        return
    atomic_write_json(path, settings)


def _write_rows(path: Path, rows: Sequence[ManifestRow], arm: str) -> Path:
    """The manifest with this arm's rows replaced and the other arms' rows kept."""
    others = [row for row in read_manifest(path) if row.arm != arm] if path.is_file() else []
    return write_manifest(path, [*others, *rows])


def _batches(jobs: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]
