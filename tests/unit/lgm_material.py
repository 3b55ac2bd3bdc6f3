"""A VAE, a teacher and videos as small as the recipes allow, for the tests of LGM training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vggrpo.io.video import write_video
from vggrpo.models.base import LatentSpec
from vggrpo.models.vggt import VGGT, VGGTConfig

SIZE = (32, 48)
FRAMES = 9


class BlockVAE(nn.Module):
    """Averages blocks of 8 pixels; latent frame k is RGB frame 4 k. Three channels, /8 in space, /4 in time."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_spec = LatentSpec(3, 4, 8, (1, 1, 1))
        self.gain = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def encode_video(self, video: Tensor) -> Tensor:
        self.latent_spec.latent_shape(*video.shape[-3:])
        return self.gain * (nn.functional.avg_pool3d(video[:, :, ::4], (1, 8, 8)) - 0.5)

    def decode(self, latents: Tensor) -> Tensor:
        frames = (latents.shape[2] - 1) * 4 + 1
        size = (frames, 8 * latents.shape[3], 8 * latents.shape[4])
        return (nn.functional.interpolate(latents, size=size) / self.gain + 0.5).clamp(0, 1)


def teacher(seed: int = 0) -> VGGT:
    torch.manual_seed(seed)
    sizes = {"dim": 32, "heads": 2, "conv_layers": 1, "pairs": 2, "hooks": (1, 2), "head_features": 8}
    model = VGGT(VGGTConfig(**sizes)).eval().requires_grad_(False)
    nn.init.normal_(model.camera_head[-1].weight, std=0.1)
    return model


def frames(seed: int, count: int = FRAMES, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Smooth random colours that drift, (T, H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    t, v, u = np.meshgrid(np.arange(count) / 9, np.arange(size[0]) / 32, np.arange(size[1]) / 32, indexing="ij")
    waves = [np.sin(2 * np.pi * (rng.normal() * u + rng.normal() * v + rng.normal() * t) + c) for c in range(3)]
    return ((np.stack(waves, -1) * 0.4 + 0.5) * 255).astype(np.uint8)


def write_videos(folder: Path, count: int, length: int = FRAMES, size: tuple[int, int] = SIZE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        write_video(folder / f"v{i}.mp4", frames(i, length, size), 10)
    return folder
