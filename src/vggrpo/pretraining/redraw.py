"""Rendered clips as the generator re-draws them: noised in part and sampled from there, as SDEdit does; truth known.

What a generator draws has artefacts that no renderer makes. A clip re-drawn from part of its noise has them and is
still, nearly, of the geometry that it was rendered with: the RGB network's rotations are off by .015 rad on 128 clips
as they were rendered, and by .021, .035, .063 when they are re-drawn from noise of .2, .5, .8; the mean path by .236.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vggrpo.models.wan import WanVideoModel
from vggrpo.pretraining.data import at_once, write_tensors
from vggrpo.sampling.flow_sde import ode_step

LOWEST, HIGHEST = 0.15, 0.7  # share of noise from which a batch is re-drawn
STEP = 0.08  # of the sampler, at most
FIRST_SEED = 5_000_000


@torch.inference_mode()
def redraw_shard(path: Path, folder: Path, video_model: WanVideoModel) -> Path:
    """The clips of a shard re-drawn, beside the shard's truth and captions, under the same name in `folder`, unless
    that file is there; written aside, then renamed."""
    target = folder / path.name
    if target.exists():
        return target
    with safe_open(path, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    captions = [text["caption"] for text in json.loads(header["texts"])]
    generator = torch.Generator().manual_seed(FIRST_SEED + int(path.stem))
    batch = at_once(video_model.device, 16, 64)
    parts = [
        redrawn(video_model, video, captions[i * batch : (i + 1) * batch], generator)
        for i, video in enumerate(tensors["video"].split(batch))
    ]
    return write_tensors(target, tensors | {"video": torch.cat(parts)}, header)


def redrawn(video_model: WanVideoModel, video: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
    """A batch of clips (B, 3, T, H, W), uint8, noised by one share between `LOWEST` and `HIGHEST` and sampled from
    there with their captions."""
    noise = LOWEST + (HIGHEST - LOWEST) * torch.rand((), generator=generator).item()
    latents = video_model.encode_video(video.to(video_model.device).float() / 255)
    latents = (1 - noise) * latents + noise * torch.randn(latents.shape, generator=generator).to(latents)
    text = video_model.encode_prompt(captions)
    sigmas = torch.linspace(noise, 0, 2 + int(noise / STEP), device=latents.device)
    for now, after in pairwise(sigmas):
        velocity = video_model.predict_velocity(latents, now.expand(len(latents)), text)
        latents = ode_step(latents, velocity, now, after)
    return (video_model.decode(latents).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
