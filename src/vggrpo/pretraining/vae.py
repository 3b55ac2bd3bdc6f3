"""Recipe of the embedded video VAE: a small `AutoencoderKLWan`, 8x in space and 4x in time, 32 channels.

Built like Wan2.2's, with parameterless shortcuts around every change of size. The encoder learns first, by what its
latents draw as principal components of blocks: three times as cheap as through the decoder, and what an LGM's
connector, a linear map, is to find in the latents is there. Then the decoder learns to draw more from them. A VAE of 16
channels whose two halves were trained together was no better than as many principal components, and a linear map drew
frames from its latents in which motion was lost.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from vggrpo.pretraining.data import Shards
from vggrpo.pretraining.loop import Logs, Schedule, Watch, fit, go_on_from, half_precision

ENCODER_SCHEDULE = Schedule(steps=4000, lr=2e-3, ema=0.998)
DECODER_SCHEDULE = Schedule(steps=6000, lr=2e-3, ema=0.998)
CHANNELS = 32
PATCH, FRAMES = 8, 4  # pixels a latent cell, frames a latent
KL_WEIGHT = 1e-4
VIEW_WEIGHT = 0.25  # of the frames that an LGM is asked about, beside all
COMPONENT_CLIPS = 192
# Short clips first: (share of the run, frames, batch). Whole clips at the end, or the causal cache drifts: a VAE that
# never saw more than 9 frames lost 5 dB between frames 9 and 17.
STAGES = ((0.20, 5, 4), (0.50, 9, 2), (1.0, 17, 2))
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


class Reader(nn.Module):
    """Draws all frames (B, 3, 4 T - 3, H, W) from latents (B, C, T, h, w): each cell its own block, as that many
    principal components of blocks. Nothing of it is trained: a reader that learns takes the encoder's scales apart.

    Args:
        video: clips (B, 3, 4 n + 1, H, W) in [-1, 1] whose components those are; latents of unit variance draw them.
    """

    basis: Tensor
    mean: Tensor

    @torch.no_grad()
    def __init__(self, video: Tensor) -> None:
        super().__init__()
        groups = video[:, :, 1:].transpose(1, 2).unflatten(1, (-1, FRAMES)).flatten(2, 3)
        blocks = nn.functional.pixel_unshuffle(groups, PATCH).movedim(2, -1).flatten(0, 3)
        weight = blocks.new_ones(FRAMES)
        weight[-1] += VIEW_WEIGHT * FRAMES  # a view has a mean of its own, over a fourth of the frames
        weight = weight.sqrt().repeat_interleave(3 * PATCH**2)
        mean = blocks.mean(0)
        rows = (blocks - mean) * weight
        variance, axes = torch.linalg.eigh(rows.T @ rows / len(rows))  # in ascending order
        basis = axes[:, -CHANNELS:] * variance[-CHANNELS:].clamp_min(0).sqrt() / weight[:, None]
        self.register_buffer("basis", basis)
        self.register_buffer("mean", mean)

    def forward(self, latents: Tensor) -> Tensor:
        cells = torch.einsum("oc,bcthw->btohw", self.basis, latents) + self.mean[:, None, None]
        groups = nn.functional.pixel_shuffle(cells, PATCH).unflatten(2, (FRAMES, 3))
        return groups.flatten(1, 2)[:, FRAMES - 1 :].transpose(1, 2)  # the first latent is one frame: its group's last


def train_vae(
    data: Shards,
    folder: Path,
    encoder: Schedule,
    decoder: Schedule,
    bf16: bool = True,
    start: AutoencoderKLWan | None = None,
    watch: Watch | None = None,
) -> AutoencoderKLWan:
    """Train from scratch or on from `start`, measure the latents' mean and std, return the finished VAE.

    First the encoder with the reader (`folder`/encoder), then the decoder on what has become of the latents
    (`folder`/decoder). All on the clips' device.
    """
    device = data.device
    torch.manual_seed(encoder.seed)
    model = build_vae()
    if start is not None:
        go_on_from(model, start, "VAE")
    reader = Reader(data.video(torch.arange(min(len(data), COMPONENT_CLIPS))) * 2 - 1)
    model = train_encoder(model.to(device), reader, data, folder / "encoder", encoder, bf16, watch)
    model = train_decoder(model, data, folder / "decoder", decoder, bf16, watch)
    finished = build_vae(*latent_statistics(model, data, reader.basis.norm(dim=0)))
    finished.load_state_dict(model.state_dict())
    return finished.to(device).eval()


def train_encoder(
    vae: AutoencoderKLWan,
    reader: Reader,
    data: Shards,
    folder: Path,
    schedule: Schedule,
    bf16: bool = True,
    watch: Watch | None = None,
) -> AutoencoderKLWan:
    """Teach the encoder latents that the reader can draw; the decoder stays as it is."""

    def loss(model: nn.ModuleList, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        video = _draw(data, schedule, step, generator)
        with half_precision(video.device, bf16):
            latents, kl = _sample(model[0], video, generator)
        output = model[1](latents)
        views = slice(None, None, FRAMES)
        value = picture_loss(video, output) + VIEW_WEIGHT * picture_loss(video[:, :, views], output[:, :, views])
        logs = {"kl": kl, "psnr": psnr(video, output), "psnr_views": psnr(video[:, :, views], output[:, :, views])}
        return value + KL_WEIGHT * kl, {name: number.detach().mean() for name, number in logs.items()}

    _thaw(vae, encoder=True)
    return fit(nn.ModuleList([vae, reader]), loss, schedule, folder, watch)[0]


def train_decoder(
    vae: AutoencoderKLWan, data: Shards, folder: Path, schedule: Schedule, bf16: bool = True, watch: Watch | None = None
) -> AutoencoderKLWan:
    """Teach the decoder to draw from the encoder's latents, which stay as they are."""

    def loss(model: AutoencoderKLWan, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        video = _draw(data, schedule, step, generator)
        with half_precision(video.device, bf16):
            with torch.no_grad():
                latents, _ = _sample(model, video, generator)
            output = model.decode(latents).sample.float()
        return picture_loss(video, output), {"psnr": psnr(video, output).mean().detach()}

    _thaw(vae, encoder=False)
    return fit(vae, loss, schedule, folder, watch)


def _thaw(vae: AutoencoderKLWan, *, encoder: bool) -> None:
    """Make one half trainable."""
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(encoder)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(not encoder)


def _draw(data: Shards, schedule: Schedule, step: int, generator: torch.Generator) -> Tensor:
    """A batch of clips in [-1, 1], as long as the stage that `step` is in wants them."""
    frames, batch = next((f, b) for share, f, b in STAGES if step < share * schedule.steps)
    index = torch.randint(len(data), (batch * schedule.batch_scale,), generator=generator)
    start = int(torch.randint(18 - frames, (1,), generator=generator))
    return data.video(index)[:, :, start : start + frames] * 2 - 1


def _sample(vae: AutoencoderKLWan, video: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents drawn from the posterior, and its mean divergence from the unit Gaussian."""
    posterior = vae.encode(video).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return mean + posterior.std.float() * noise, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKLWan, data: Shards, gain: Tensor, clips: int = 512
) -> tuple[list[float], list[float]]:
    """What normalises the latents, from the first `clips` clips: each channel's mean, and its standard deviation over
    its `gain`, so that normalised channels have that spread and unit variance on average.

    With the reader's gain, noise on the latents is noise of one size all over the picture, and a generator finds what
    is large first. Of equal spread, the channels of detail, half of all, took a generator's whole attention.
    """
    latents = [
        vae.encode(data.video(torch.arange(i, min(i + 8, clips))) * 2 - 1).latent_dist.mean
        for i in range(0, min(clips, len(data)), 8)
    ]
    flat = torch.cat(latents).transpose(0, 1).flatten(1)
    return flat.mean(1).tolist(), (flat.std(1) * gain.square().mean().sqrt() / gain).tolist()


@torch.no_grad()
def measure_vae(vae: AutoencoderKLWan, data: Shards, clips: int = 128) -> dict[str, float]:
    """Mean PSNR of held-out clips, decibels."""
    rows = []
    for low in range(0, min(clips, len(data)), 8):
        video = data.video(torch.arange(low, min(low + 8, clips, len(data)))) * 2 - 1
        output = vae.decode(vae.encode(video).latent_dist.mean).sample
        rows.append(psnr(video, output))
    return {"psnr": torch.cat(rows).mean().item()}
