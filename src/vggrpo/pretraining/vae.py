"""Recipe of the embedded video VAE: a small `AutoencoderKLWan`, 8x in space and 4x in time, 32 channels.

Built like Wan2.2's, with parameterless shortcuts around every change of size. While it learns, one 5x5x5 convolution
has to draw the frames at the latents' own rate from the latents (thrown away afterwards): a small decoder keeps few
frames apart that its latents do not show plainly, and what reads geometry out of latents has a connector of just that
kind.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from vggrpo.lgm.connector import Connector
from vggrpo.pretraining.data import Shards
from vggrpo.pretraining.loop import Logs, Schedule, Watch, fit

SCHEDULE = Schedule(steps=8000, lr=2e-3, ema=0.998)
CHANNELS = 32
PATCH = 8  # pixels a latent cell
KL_WEIGHT = 1e-4
READ_WEIGHT = 1.0
# Short clips first: (share of the run, frames, batch). Whole clips at the end, or the causal cache drifts: a VAE that
# never saw more than 9 frames lost 5 dB between frames 9 and 17.
STAGES = ((0.35, 5, 4), (0.60, 9, 2), (1.0, 17, 2))
MSE_WEIGHT = 3.0


def build_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """The architecture; `mean` and `std` of its latents once they are measured."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=12,
        z_dim=CHANNELS,
        dim_mult=[2, 4, 4],
        num_res_blocks=1,
        is_residual=True,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=PATCH,
        scale_factor_temporal=4,
        latents_mean=mean or [0.0] * CHANNELS,
        latents_std=std or [1.0] * CHANNELS,
    )


def picture_loss(video: Tensor, output: Tensor) -> Tensor:
    """L1 and MSE on pixels, L1 on their differences. Videos in [-1, 1]."""
    pixel = (output - video).abs().mean()
    edges = sum((output.diff(dim=d) - video.diff(dim=d)).abs().mean() for d in (-1, -2)) / 2
    return pixel + edges + MSE_WEIGHT * (output - video).square().mean()


def psnr(video: Tensor, output: Tensor) -> Tensor:
    """Of each clip, decibels. Videos in [-1, 1]."""
    return -10 * ((output.clamp(-1, 1) - video) / 2).square().mean(dim=(1, 2, 3, 4)).log10()


class Readable(nn.Module):
    """The VAE with the one convolution that draws views (B, 3, S, H, W) from latents (B, C, S, h, w)."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae
        self.reader = Connector(CHANNELS, 3 * PATCH**2, 1)

    def read(self, latents: Tensor) -> Tensor:
        cells = self.reader(latents).transpose(1, 2)  # (B, S, 3 P P, h, w)
        return nn.functional.pixel_shuffle(cells, PATCH).transpose(1, 2)


def train_vae(
    data: Shards,
    folder: Path,
    schedule: Schedule = SCHEDULE,
    bf16: bool = True,
    start: AutoencoderKLWan | None = None,
    watch: Watch | None = None,
) -> AutoencoderKLWan:
    """Train from scratch or on from `start`, measure the latents' mean and std, return the finished VAE.

    All on the clips' device.
    """
    device = data.device
    torch.manual_seed(schedule.seed)
    model = build_vae()
    if start is not None:
        model.load_state_dict(start.float().state_dict())

    def loss(model: Readable, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        frames, batch = next((f, b) for share, f, b in STAGES if step < share * schedule.steps)
        index = torch.randint(len(data), (batch * schedule.batch_scale,), generator=generator)
        start = int(torch.randint(18 - frames, (1,), generator=generator))
        video = data.video(index)[:, :, start : start + frames] * 2 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            posterior = model.vae.encode(video).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            latents = posterior.mean + posterior.std * noise
            output, read = model.vae.decode(latents).sample.float(), model.read(latents).float()
        views, mean, logvar = video[:, :, ::4], posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        value = picture_loss(video, output) + READ_WEIGHT * picture_loss(views, read) + KL_WEIGHT * kl
        logs = {"kl": kl, "psnr": psnr(video, output).mean(), "psnr_read": psnr(views, read).mean()}
        return value, {name: number.detach() for name, number in logs.items()}

    model = fit(Readable(model).to(device), loss, schedule, folder, watch).vae
    mean, std = latent_statistics(model, data)
    finished = build_vae(mean, std)
    finished.load_state_dict(model.state_dict())
    return finished.to(device).eval()


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, data: Shards, clips: int = 512) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over the first `clips` clips."""
    latents = [
        vae.encode(data.video(torch.arange(i, min(i + 8, clips))) * 2 - 1).latent_dist.mean
        for i in range(0, min(clips, len(data)), 8)
    ]
    flat = torch.cat(latents).transpose(0, 1).flatten(1)
    return flat.mean(1).tolist(), flat.std(1).tolist()


@torch.no_grad()
def measure_vae(vae: AutoencoderKLWan, data: Shards, clips: int = 128) -> dict[str, float]:
    """Mean PSNR of held-out clips, decibels."""
    rows = []
    for low in range(0, min(clips, len(data)), 8):
        video = data.video(torch.arange(low, min(low + 8, clips, len(data)))) * 2 - 1
        output = vae.decode(vae.encode(video).latent_dist.mean).sample
        rows.append(psnr(video, output))
    return {"psnr": torch.cat(rows).mean().item()}
