"""A randomly initialised `WanPipeline` directory, as small as the architecture allows."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ("a", "red", "blue", "sphere", "box", "rolls", "the", "camera", "orbits", "left", "room")


def build_tokenizer():
    """A word-level tokenizer with the special tokens of T5: unknown words become <unk>, texts end with </s>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def save_tiny_wan(
    directory: Path,
    *,
    seed: int = 0,
    channels: int = 4,
    solver: str = "euler",
    expand_timesteps: bool = False,
    width: int = 24,
    ti2v: bool = False,
) -> Path:
    """Save a random pipeline (4 latent channels, /8 in space, /4 in time, 2 blocks) and return its directory.

    `ti2v`: of Wan2.2-TI2V's kind: /16 in space by a VAE that works on 2x2 patches, and a timestep per token."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1 * i for i in range(channels)],
        latents_std=[1.0 + 0.2 * i for i in range(channels)],
        **({"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True, "scale_factor_spatial": 16,
            "decoder_base_dim": 4} if ti2v else {}),
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=width // 2,
        in_channels=channels,
        out_channels=channels,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=64,
    )
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=3.0)
        if solver == "euler"
        else UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    )
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
        expand_timesteps=expand_timesteps or ti2v,
    ).save_pretrained(str(directory))
    return directory
