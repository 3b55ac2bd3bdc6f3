"""Wan text-to-video models in diffusers' `WanPipeline` format, behind the `VideoModel` protocol.

One code path for the embedded model and for Wan2.1 / Wan2.2-TI2V: a directory (or hub id) with `transformer`, `vae`,
`text_encoder`,
`tokenizer` and `scheduler`. Numbers agree with the plain pipeline: timestep = 1000 t, prompts cleaned, cut and
zero-padded to 512 tokens,
latents normalised by the VAE's `latents_mean / latents_std`; the network may run in bfloat16, latents and velocities
stay float32.

Deviation: `sigmas` puts `linspace(1, 0)` through the pipeline's shift once. diffusers' UniPC starts at 0.9999990
instead of 1, and its
FlowMatchEuler applies a static shift twice; `solver` gives exactly those, for sampling as the plain pipeline does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.errors import UserError
from vggrpo.models.base import LatentSpec
from vggrpo.models.pretrained import is_hub_id, one_line, quiet_diffusers, require_names
from vggrpo.models.text_attention import MergedPaddingAttention

MAX_TEXT_TOKENS = (
    512  # WanPipeline's own length; the transformer attends to the zero padding, so it is part of the model
)
NUM_TRAIN_TIMESTEPS = 1000.0


class WanVAE:
    """The VAE of a Wan pipeline, without what generates: satisfies `vggrpo.models.vae.VAE`."""

    def __init__(self, vae: nn.Module | None, latent_spec: LatentSpec) -> None:
        self.vae, self.latent_spec = vae, latent_spec
        if vae is not None:
            vae.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> WanVAE:
        """Load the VAE of a `WanPipeline` directory or hub id, in float32; of the transformer only the config is read.

        Raises:
            UserError: as `WanVideoModel.from_pretrained`.
        """
        from diffusers import AutoencoderKLWan

        spec = read_latent_spec(path)
        return cls(_load(AutoencoderKLWan, path, "vae", torch_dtype=torch.float32).to(device), spec)

    @property
    def device(self) -> torch.device:
        """Where latents and videos are made."""
        return next(self._require_vae().parameters()).device

    def encode_video(self, video: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B C T1 H1 W1"]:
        """Normalised latents `(z - latents_mean) / latents_std` of the posterior's mode; video in [0, 1]."""
        vae = self._require_vae()
        self.latent_spec.latent_shape(*video.shape[-3:])
        latents = vae.encode((video * 2 - 1).to(self.device, torch.float32)).latent_dist.mode()
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    def decode(self, latents: Float[Tensor, "B C T1 H1 W1"]) -> Float[Tensor, "B 3 T H W"]:
        """Video in [0, 1] of normalised latents."""
        vae = self._require_vae()
        latents = latents.to(self.device, torch.float32)
        mean, std = self._latent_statistics(latents)
        video = vae.decode(latents * std + mean, return_dict=False)[0]
        return (video / 2 + 0.5).clamp(0, 1)

    def _require_vae(self) -> nn.Module:
        if self.vae is None:
            raise UserError("this model was loaded without its VAE; load it with load_vae=True")
        return self.vae

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, (1, C, 1, 1, 1)."""
        config = self._require_vae().config
        mean, std = (
            torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std


class WanVideoModel(WanVAE):
    """A loaded Wan pipeline. Nothing requires gradients until a LoRA is attached (`vggrpo.models.lora`)."""

    pipeline = "WanPipeline"

    def __init__(
        self,
        transformer: nn.Module,
        scheduler: Any,
        *,
        vae: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        latent_spec: LatentSpec,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__(vae, latent_spec)
        self.transformer = transformer
        self.scheduler = scheduler
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.frame_times = expand_timesteps
        self.autocast: torch.dtype | None = None
        for module in (transformer, text_encoder):
            if module is not None:
                module.eval().requires_grad_(False)
        self._text_attention = MergedPaddingAttention()
        for block in transformer.blocks:
            block.attn2.set_processor(self._text_attention)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        load_vae: bool = True,
        load_text: bool = True,
    ) -> WanVideoModel:
        """Load a `WanPipeline` directory or hub id.

        Args:
            path: directory with `model_index.json`, or a hub id such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.
            device: where all parts go.
            dtype: of transformer and text encoder; the VAE stays float32, as Wan asks for.
            load_vae: leave the VAE out where only latents are needed.
            load_text: leave tokenizer and text encoder out where embeddings are cached.

        Raises:
            UserError: when a part is missing or damaged, or the pipeline is of a kind that is not supported.
        """
        from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
        from diffusers import FlowMatchEulerDiscreteScheduler as Euler
        from transformers import AutoTokenizer, UMT5EncoderModel

        index = _read_index(path)
        transformer = _load(WanTransformer3DModel, path, "transformer", torch_dtype=dtype)
        if transformer.config.in_channels != transformer.config.out_channels:
            raise UserError(
                f"{path} is an image-to-video pipeline with extra input channels; use a text-to-video one such as "
                "Wan2.1-T2V-1.3B, or Wan2.2-TI2V-5B, which continues a first frame without them"
            )
        euler = "FlowMatchEuler" in str(index.get("scheduler"))
        spec = _spec(transformer.config, _load_config(AutoencoderKLWan, path, "vae"))
        vae = _load(AutoencoderKLWan, path, "vae", torch_dtype=torch.float32) if load_vae else None
        text_encoder = _load(UMT5EncoderModel, path, "text_encoder", torch_dtype=dtype) if load_text else None
        model = cls(
            transformer.to(device),
            _load(Euler if euler else UniPCMultistepScheduler, path, "scheduler"),
            vae=None if vae is None else vae.to(device),
            text_encoder=None if text_encoder is None else text_encoder.to(device),
            tokenizer=_load(AutoTokenizer, path, "tokenizer") if load_text else None,
            latent_spec=spec,
            expand_timesteps=bool(index.get("expand_timesteps", False)),
        )
        return model

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def release_encoders(self, vae: bool = True) -> None:
        """Forget the text encoder, and the VAE if asked: everything is encoded and cached."""
        self.text_encoder = self.tokenizer = None
        if vae:
            self.vae = None

    def encode_prompt(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """Text embeddings (B, 512, D): cleaned, cut at 512 tokens, zero after the end, as `WanPipeline` makes them."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        if self.text_encoder is None or self.tokenizer is None:
            raise UserError("this model was loaded without its text encoder; load it with load_text=True")
        tokens = self.tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=MAX_TEXT_TOKENS,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = next(self.text_encoder.parameters()).device
        ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        # Masked keys do not reach the tokens before them, so the encoder may stop at the longest text of the batch.
        longest = max(1, int(mask.sum(dim=1).max()))
        hidden = self.text_encoder(ids[:, :longest], mask[:, :longest]).last_hidden_state
        text = hidden.new_zeros(len(prompts), MAX_TEXT_TOKENS, hidden.shape[-1])
        text[:, :longest] = torch.where(mask[:, :longest, None] > 0, hidden, 0.0)
        return text.to(self.device)

    def predict_velocity(
        self, latents: Float[Tensor, "B C T1 H1 W1"], t: Float[Tensor, "B ..."], text: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B C T1 H1 W1"]:
        """Velocity `eps - x0` in float32; `t` in [0, 1]: one per sample, one for all, or (B, T') one per latent frame.

        Raises:
            UserError: for times per frame where the pipeline has no timestep per token.
        """
        dtype = self.transformer.dtype
        with torch.autocast(latents.device.type, self.autocast, enabled=self.autocast is not None):
            velocity = self.transformer(
                hidden_states=latents.to(dtype),
                timestep=self._timesteps(latents, t),
                encoder_hidden_states=self._text_attention.merge(text).to(dtype),
                return_dict=False,
            )[0]
        return velocity.float()

    def _timesteps(self, latents: Tensor, t: Tensor) -> Float[Tensor, "B ..."]:
        """`1000 t`: one per sample, or one per token for a pipeline that takes them so (Wan2.2-TI2V)."""
        batch = len(latents)
        frames, height, width = latents.shape[-3:]
        timestep = t.to(latents.device, torch.float32) * NUM_TRAIN_TIMESTEPS
        if not self.frame_times:
            if timestep.ndim == 2:
                raise UserError(
                    "this pipeline has one timestep for all frames and cannot continue a first frame; "
                    "use Wan2.2-TI2V-5B"
                )
            return timestep.expand(batch)
        patch_t, patch_h, patch_w = self.latent_spec.patch_size
        if timestep.ndim < 2:
            timestep = timestep.expand(batch)[:, None].expand(-1, frames)
        tokens_per_frame = (height // patch_h) * (width // patch_w)
        return timestep[:, ::patch_t].repeat_interleave(tokens_per_frame, dim=1)

    def sigmas(self, num_steps: int, shift: float | None = None) -> Float[Tensor, " S1"]:
        """Flow times `shift u / (1 + (shift - 1) u)` for u = 1 ... 0, (num_steps + 1,), on the CPU in float32."""
        if shift is None:
            config = self.scheduler.config
            shift = float(config.get("flow_shift") or config.get("shift") or 1.0)
        u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return (shift * u / (1 + (shift - 1) * u)).float()

    def solver(self, num_steps: int) -> Any:
        """A fresh copy of the pipeline's scheduler with its timesteps set, as `WanPipeline` uses it."""
        solver = copy.deepcopy(self.scheduler)
        solver.set_timesteps(num_steps, device=self.device)
        solver.set_begin_index(0)
        return solver


def read_latent_spec(path: str | Path) -> LatentSpec:
    """The latents of a pipeline, read off its configs without loading it.

    Raises:
        UserError: as `WanVideoModel.from_pretrained`, of the configs.
    """
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    _read_index(path)
    return _spec(_load_config(WanTransformer3DModel, path, "transformer"), _load_config(AutoencoderKLWan, path, "vae"))


def _spec(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentSpec:
    return LatentSpec(
        channels=transformer.get("in_channels", 16),
        temporal_stride=vae.get("scale_factor_temporal", 4),
        spatial_stride=vae.get("scale_factor_spatial", 8),
        patch_size=tuple(transformer.get("patch_size", (1, 2, 2))),
        mean=tuple(vae.get("latents_mean") or ()),
        std=tuple(vae.get("latents_std") or ()),
    )


def _read_index(path: str | Path) -> dict[str, Any]:
    """The pipeline's `model_index.json`, checked for what is not supported."""
    from diffusers import WanPipeline

    if not Path(path).is_dir() and not is_hub_id(path):
        raise UserError(
            f"no diffusers WanPipeline at {path} (no such directory); give one with model_index.json, or a hub id"
        )
    try:
        index = WanPipeline.load_config(str(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"no diffusers WanPipeline at {path} ({_first_line(error)}); give a directory with "
            "model_index.json, or a hub id, and check the name and the network"
        ) from error
    if not isinstance(index, dict):
        raise UserError(f"{path}/model_index.json holds no object; copy the directory again")
    second = index.get("transformer_2")
    if index.get("boundary_ratio") is not None or (second and second[0] is not None):
        raise UserError(
            f"{path} has two experts (transformer_2, as Wan2.2-A14B), which is not supported: one LoRA cannot serve "
            "both; use Wan2.1-T2V or Wan2.2-TI2V-5B"
        )
    return dict(index)


def _load_config(cls: Any, path: str | Path, subfolder: str) -> dict[str, Any]:
    try:
        return dict(cls.load_config(str(path), subfolder=subfolder))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}/{subfolder} has no readable config.json ({_first_line(error)}); copy the directory again"
        ) from error


def _load(cls: Any, path: str | Path, subfolder: str, **options: Any) -> Any:
    """`from_pretrained` of one part, with a one-line error that says which part is broken."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    quiet = Path(path).is_dir() and logging.is_progress_bar_enabled()  # a bar is for downloads
    try:
        if quiet:
            logging.disable_progress_bar()
        with quiet_diffusers():
            if not (issubclass(cls, nn.Module) and hasattr(cls, "load_config")):
                return cls.from_pretrained(str(path), subfolder=subfolder, **options)
            # A network of diffusers: what its file lacks would stay without values, with a warning.
            network, info = cls.from_pretrained(str(path), subfolder=subfolder, output_loading_info=True, **options)
            require_names(info["missing_keys"], ())
            return network
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(
            f"cannot load {subfolder} of {path}: {_first_line(error)}; the file is missing, damaged "
            "or of another model: copy it again"
        ) from error
    finally:
        if quiet:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return one_line(error)[:200]
