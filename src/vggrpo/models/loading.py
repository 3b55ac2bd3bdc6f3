"""Which device, and which directory: what every command that loads a video model asks first."""

from __future__ import annotations

from pathlib import Path

import torch

from vggrpo import assets
from vggrpo.config import EMBEDDED
from vggrpo.errors import UserError
from vggrpo.models.wan import WanVideoModel


def load_video_model(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    local_rank: int = 0,
    load_vae: bool = True,
    load_text: bool = True,
) -> WanVideoModel:
    """Load a diffusers Wan directory, a hub id, or the shipped pipeline ("embedded")."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {dtype!r}; use float32 or bfloat16")
    return WanVideoModel.from_pretrained(
        assets.path("pipeline") if str(path) == EMBEDDED else path,
        pick_device(device, local_rank),
        getattr(torch, dtype),
        load_vae=load_vae,
        load_text=load_text,
    )


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """ "auto" is this process's own GPU, or the CPU where there is none."""
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name!r} is no device; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"the device is {name} but torch sees no CUDA GPU; use auto or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
