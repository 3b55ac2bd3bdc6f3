"""Recipe of the embedded video VAE: a small `AutoencoderKLWan`, 8x in space and 4x in time, 16 channels."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from vggrpo.pretraining.data import Shards
from vggrpo.pretraining.loop import Logs, Schedule, Watch, fit

SCHEDULE = Schedule(steps=10500, lr=1e-3, ema=0.998)
KL_WEIGHT = 1e-4
# Short clips first: (share of the run, frames, batch). Whole clips at the end, or the causal cache drifts: a VAE that
# never saw more than 9 frames lost 5 dB between frames 9 and 17.
STAGES = ((0.60, 5, 4), (0.85, 9, 2), (1.0, 17, 2))
MSE_WEIGHT = 3.0


def build_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """The architecture; `mean` and `std` of its latents once they are measured."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=16,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=mean or [0.0] * 16,
        latents_std=std or [1.0] * 16,
    )


def vae_loss(video: Tensor, output: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Logs]:
    """L1 and MSE on pixels, L1 on their differences, a light KL to the unit Gaussian. Video in [-1, 1]."""
    pixel = (output - video).abs().mean()
    edges = sum((output.diff(dim=d) - video.diff(dim=d)).abs().mean() for d in (-1, -2)) / 2
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    mse = ((output.clamp(-1, 1) - video) / 2).square().mean(dim=(1, 2, 3, 4))
    psnr = (-10 * mse.log10()).mean().detach()
    squares = MSE_WEIGHT * (output - video).square().mean()
    return pixel + edges + squares + KL_WEIGHT * kl, {"l1": pixel.detach(), "kl": kl.detach(), "psnr": psnr}


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

    def loss(vae: AutoencoderKLWan, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        frames, batch = next((f, b) for share, f, b in STAGES if step < share * schedule.steps)
        index = torch.randint(len(data), (batch * schedule.batch_scale,), generator=generator)
        start = int(torch.randint(18 - frames, (1,), generator=generator))
        video = data.video(index)[:, :, start : start + frames] * 2 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            posterior = vae.encode(video).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        return vae_loss(video, output.float(), posterior.mean.float(), posterior.logvar.float())

    model = fit(model.to(device), loss, schedule, folder, watch)
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
        output = vae.decode(vae.encode(video).latent_dist.mean).sample.clamp(-1, 1)
        rows.append(-10 * ((output - video) / 2).square().mean(dim=(1, 2, 3, 4)).log10())
    return {"psnr": torch.cat(rows).mean().item()}
