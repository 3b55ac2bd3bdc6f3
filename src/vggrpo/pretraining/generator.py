"""Recipe of the embedded video generator: a small `WanTransformer3DModel` with its text encoder.

Trained by flow matching on latents.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vggrpo.models.base import LatentSpec
from vggrpo.models.wan import WanVideoModel
from vggrpo.pretraining.data import CPU, Shards, at_once, write_tensors
from vggrpo.pretraining.loop import Logs, Schedule, Watch, fit, go_on_from, half_precision
from vggrpo.pretraining.text import TEXT_DIM, build_text_encoder, build_tokenizer
from vggrpo.pretraining.vae import CHANNELS
from vggrpo.world.captions import caption

SCHEDULE = Schedule(steps=7000, lr=1e-3, warmup=200, ema=0.9985, weight_decay=0.01)
BATCH = 32
CAPTION_DROPOUT = 0.1
# Noise levels while training: logit-normal, pushed towards noise as at sampling time.
TRAIN_SHIFT, SAMPLE_SHIFT = 2.0, 3.0


def build_transformer() -> WanTransformer3DModel:
    """About four million parameters; tokens are 2x2 latent cells as in Wan2.1."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=640,
        num_layers=7,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def build_scheduler() -> UniPCMultistepScheduler:
    """The scheduler that Wan pipelines ship with."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=SAMPLE_SHIFT
    )


@torch.no_grad()
def encode_latents(vae: AutoencoderKLWan, shard: Path, folder: Path) -> Path:
    """Normalised latents of a shard's clips and of their mirror images, made on the VAE's device.

    `latents`, `mirrored`: (N, C, T', H', W') float16.
    """
    path = folder / shard.name
    if path.exists():
        return path
    device = next(vae.parameters()).device
    data = Shards.load([shard], truth=False, device=device)
    mean, std = (
        torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    columns: dict[str, list[Tensor]] = {"latents": [], "mirrored": []}
    batch = at_once(device, 8, 64)
    for low in range(0, len(data), batch):
        video = data.video(torch.arange(low, min(low + batch, len(data)))) * 2 - 1
        for name, frames in (("latents", video), ("mirrored", video.flip(-1))):
            with half_precision(device):
                latents = vae.encode(frames).latent_dist.mean.float()
            columns[name].append(((latents - mean) / std).half().cpu())
    return write_tensors(path, {k: torch.cat(v) for k, v in columns.items()})


def mirrored_attributes(attributes: dict) -> dict:
    """What the mirror image of a clip shows: left and right change places in the camera's moves."""
    swap = {"left": "right", "right": "left"}
    moves = [
        kind + (sep + swap.get(side, side) if sep else "")
        for kind, sep, side in (m.partition("_") for m in attributes["camera"])
    ]
    return attributes | {"camera": moves}


class Generator(nn.Module):
    """Transformer and text encoder as one module for the training loop."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.transformer = build_transformer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))


def train_generator(
    latents: list[Path],
    texts: list[dict],
    folder: Path,
    schedule: Schedule = SCHEDULE,
    bf16: bool = True,
    start: WanPipeline | None = None,
    device: torch.device = CPU,
    watch: Watch | None = None,
) -> Generator:
    """Train from scratch, or on from the networks of `start`, on `device`.

    Flow matching: `x_t = (1 - t) x0 + t eps`, target `eps - x0`. Captions are worded anew at every visit.
    """
    columns: dict[str, list[Tensor]] = {"latents": [], "mirrored": []}
    for path in latents:
        with safe_open(path, "pt") as file:
            for name in columns:
                columns[name].append(file.get_tensor(name))
    data = torch.stack([torch.cat(columns["latents"]), torch.cat(columns["mirrored"])])
    data = data.to(device)  # (2, N, C, T', H', W'): 20 KB a clip
    attributes = [[t["attributes"] for t in texts], [mirrored_attributes(t["attributes"]) for t in texts]]
    batch = BATCH * schedule.batch_scale
    torch.manual_seed(schedule.seed)
    generator_model = Generator()
    if start is not None:
        go_on_from(generator_model.transformer, start.transformer, "transformer")
        go_on_from(generator_model.text_encoder, start.text_encoder, "text encoder")

    def loss(model: Generator, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        index = torch.randint(data.shape[1], (batch,), generator=generator)
        mirrored = torch.randint(2, (batch,), generator=generator)
        drop = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
        words = np.random.default_rng([schedule.seed, step])
        prompts = [
            "" if d else caption(attributes[m][i], words)
            for i, m, d in zip(index.tolist(), mirrored.tolist(), drop, strict=True)
        ]
        clean = data[mirrored, index].float()
        t = torch.sigmoid(torch.randn(batch, generator=generator))
        t = (TRAIN_SHIFT * t / (1 + (TRAIN_SHIFT - 1) * t)).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        mix = t.view(-1, 1, 1, 1, 1)
        wan = _as_video_model(model)
        # On a CPU the fused attention's backward pass in bfloat16 is half of the step; plain products are not.
        attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
        with attention, half_precision(device, bf16):
            velocity = wan.predict_velocity((1 - mix) * clean + mix * noise, t, wan.encode_prompt(prompts))
        return (velocity.float() - (noise - clean)).square().mean(), {}

    return fit(generator_model.to(device), loss, schedule, folder, watch)


def _as_video_model(model: Generator) -> WanVideoModel:
    """The adapter that post-training uses, so that training and use see texts and times alike. It freezes; we thaw."""
    video_model = model.__dict__.get("_video_model")
    if video_model is None:
        spec = LatentSpec(
            channels=model.transformer.config.in_channels, patch_size=tuple(model.transformer.config.patch_size)
        )
        video_model = WanVideoModel(
            model.transformer,
            build_scheduler(),
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            latent_spec=spec,
        )
        model.requires_grad_(True).train()
        model.__dict__["_video_model"] = video_model  # not a submodule: it would be saved twice
    return video_model


def save_pipeline(model: Generator, vae: AutoencoderKLWan, directory: Path) -> None:
    """Write a plain diffusers `WanPipeline` directory, weights in float16."""
    pipeline = WanPipeline(
        tokenizer=model.tokenizer,
        text_encoder=model.text_encoder.half(),
        vae=vae.half(),
        transformer=model.transformer.half(),
        scheduler=build_scheduler(),
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
    _name_tokenizer(directory)
    _forget_origin(directory / "vae" / "config.json")


def _name_tokenizer(directory: Path) -> None:
    """Name the tokenizer's class as every version of transformers knows it."""
    for file in (directory / "model_index.json", directory / "tokenizer" / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def _forget_origin(config: Path) -> None:
    """Drop the folder that a part was loaded from: it means nothing to others."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n")
