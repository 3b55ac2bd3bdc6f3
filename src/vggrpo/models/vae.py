"""The part of a video model that an LGM needs: a VAE. And a VAE that is no video model: a small image autoencoder.

`WanVAE` satisfies `VAE`, and so does the whole `WanVideoModel`. `ImageVAE` encodes every frame by itself (temporal
stride 1): the TAESD family of madebyollin/taesd in its variant with pooling blocks (FLUX.2's latent space, 32 channels,
/8).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.errors import UserError
from vggrpo.models.base import LatentSpec


@runtime_checkable
class VAE(Protocol):
    """Videos in [0, 1] to normalised latents and back."""

    latent_spec: LatentSpec

    def encode_video(self, video: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B C T1 H1 W1"]:
        """Normalised latents of a video."""
        ...

    def decode(self, latents: Float[Tensor, "B C T1 H1 W1"]) -> Float[Tensor, "B 3 T H W"]:
        """Video of normalised latents."""
        ...


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    """Three convolutions with a residual; `pool` adds 1x1 convolutions around a normalisation over the whole image."""

    def __init__(self, width: int, pool: bool = False) -> None:
        super().__init__()
        layers = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.pool: nn.Module | None = None
        if pool:
            wide = 4 * width
            widen, narrow = nn.Conv2d(width, wide, 1, bias=False), nn.Conv2d(wide, width, 1, bias=False)
            self.pool = nn.Sequential(widen, nn.GroupNorm(4, wide), nn.ReLU(), narrow)

    def forward(self, x: Float[Tensor, "N D h w"]) -> Float[Tensor, "N D h w"]:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


def _encoder(channels: int, width: int = 64) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), _Block(width)]
    for stage in range(3):
        layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
        layers += [_Block(width, pool=stage == 2) for _ in range(3)]
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))


def _decoder(channels: int, width: int = 64) -> nn.Sequential:
    layers: list[nn.Module] = [_Clamp(), nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for stage in range(3):
        layers += [_Block(width, pool=stage == 0) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, _Block(width), nn.Conv2d(width, 3, 3, padding=1))


class ImageVAE(nn.Module):
    """A per-frame autoencoder. Its latents are already near zero mean and unit variance, so nothing is normalised."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.latent_spec = LatentSpec(channels, temporal_stride=1, spatial_stride=8, patch_size=(1, 2, 2))
        self.encoder, self.decoder = _encoder(channels), _decoder(channels)

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str | torch.device = "cpu") -> ImageVAE:
        """Load a directory with one `*_encoder.pth` and one `*_decoder.pth` (or `.safetensors`).

        Raises:
            UserError: a file is missing, damaged, or of another architecture.
        """
        states = {part: _read_state(Path(directory), part) for part in ("encoder", "decoder")}
        outputs = [value.shape[0] for name, value in states["encoder"].items() if name.endswith("bias") and value.ndim]
        model = cls(outputs[-1] if outputs else 1)
        for part, state in states.items():
            try:
                getattr(model, part).load_state_dict(state)
            except RuntimeError as error:
                lines = str(error).split("\n")
                raise UserError(
                    f"the {part} in {directory} is of another architecture ({lines[1].strip()[:160]}); "
                    "use an autoencoder with pooling blocks, such as taef2"
                ) from error
        return model.to(device).eval().requires_grad_(False)

    def encode_video(self, video: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B C T H1 W1"]:
        self.latent_spec.latent_shape(*video.shape[-3:])
        frames = video.to(next(self.parameters())).transpose(1, 2)  # (B, T, 3, H, W)
        return self.encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)

    def decode(self, latents: Float[Tensor, "B C T H1 W1"]) -> Float[Tensor, "B 3 T H W"]:
        frames = latents.to(next(self.parameters())).transpose(1, 2)
        video = self.decoder(frames.flatten(0, 1)).clamp(0, 1)
        return video.unflatten(0, frames.shape[:2]).transpose(1, 2)


def weights_hash(*modules: nn.Module | None) -> str:
    """SHA-256 over names and values of all tensors: two models are the same if this is."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()) if module is not None else ():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def vae_hash(vae: VAE) -> str:
    """`weights_hash` of a VAE, or of that of a whole video model."""
    return weights_hash(getattr(vae, "vae", vae))  # type: ignore[arg-type]


def _read_state(directory: Path, part: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found = sorted(directory.glob(f"*_{part}.safetensors")) + sorted(directory.glob(f"*_{part}.pth"))
    if not found:
        raise UserError(f"no *_{part}.pth or *_{part}.safetensors in {directory}; give the autoencoder's directory")
    try:
        if found[0].suffix == ".safetensors":
            return load_file(found[0])
        return torch.load(found[0], map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{found[0]} cannot be read ({str(error).splitlines()[0][:120]}); copy it again") from error
