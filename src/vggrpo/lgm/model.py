"""The Latent Geometry Model: `LGM(z) = heads . T_L ... T_{l+1} . S_psi(z)` (METHOD section 1).

A frozen geometry network keeps its layers after `l`, adapted by a LoRA; a connector puts video latents in the place of
the tokens that layer `l` would have made from RGB. No frame is ever decoded, and everything is differentiable in the
latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from vggrpo import assets
from vggrpo.config import EMBEDDED
from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction
from vggrpo.lgm.connector import Connector, ViewRate, at_view_rate
from vggrpo.models.base import GeometryModel, LatentSpec
from vggrpo.models.licences import licence_of
from vggrpo.models.loading import load_geometry_model
from vggrpo.models.pretrained import (
    fill,
    read_config,
    read_weights,
    reading,
    require_names,
    write_pretrained,
)
from vggrpo.models.vae import VAE, vae_hash, weights_hash


class LGMConfig(BaseModel):
    """What an LGM was made for; loading refuses what does not fit."""

    model_config = ConfigDict(extra="forbid")
    geometry: str = Field(
        description="geometry model: directory (absolute or relative to the LGM), hub id, or embedded"
    )
    vae: str = Field(description="name of the VAE whose latents it reads")
    latent_channels: int = Field(ge=1)
    temporal_stride: int = Field(4, ge=1, description="RGB frames a latent frame")
    layer: int = Field(
        0, ge=0, description="stitch point: the connector's tokens take the place of this layer's output"
    )
    stride: int = Field(1, ge=1, description="spatial stride of the connector")
    view_rate: ViewRate = "latent"
    lora_rank: int = Field(64, ge=0, description="0: no LoRA, the connector alone is trained")
    lora_alpha: int = Field(32, ge=1)
    backend: str = Field("vggt", description="`model_type` of the geometry model")
    spatial_stride: int | None = Field(None, ge=1, description="pixels a latent cell; null: not recorded")
    latents_mean: list[float] | None = Field(None, description="per channel, what the latents were normalised with")
    latents_std: list[float] | None = None
    geometry_sha256: str | None = Field(
        None, description="`weights_hash` of the geometry model it was made on; null: not recorded"
    )
    vae_sha256: str | None = Field(None, description="`vae_hash` of the VAE it was made for; null: not recorded")


class LatentGeometryModel(nn.Module):
    """Latents in, geometry out. Build with `from_pretrained`, or around a geometry model for training."""

    def __init__(self, config: LGMConfig, geometry: GeometryModel) -> None:
        super().__init__()
        if geometry.model_type != config.backend:
            raise UserError(
                f"this LGM was made for a geometry model of type {config.backend!r}, {config.geometry} holds a "
                f"{geometry.model_type!r}; name the one it was made for"
            )
        points = geometry.stitch_points()
        if config.layer not in points:
            raise UserError(
                f"layer is {config.layer}, but the heads of {config.geometry} read tokens before that; choose one of "
                f"{points[0]} to {points[-1]}"
            )
        self.config = config
        self.geometry: Any = geometry
        self.connector = Connector(config.latent_channels, geometry.embed_dim(config.layer), config.stride)
        # Mean activation of the special tokens at the stitch point: first view, other views.
        self.register_buffer("special", geometry.special_tokens(config.layer).detach().clone())

    def forward(self, latents: Float[Tensor, "B C T H W"]) -> GeometryPrediction:
        """Geometry of each view, from normalised latents.

        Raises:
            UserError: latents of another VAE (channels), not five-dimensional, or not finite.
        """
        return self.predict(latents)[0]

    def predict(self, latents: Float[Tensor, "B C T H W"]) -> tuple[GeometryPrediction, dict[str, Tensor]]:
        """`forward` with the raw logits that a loss needs."""
        self._check(latents)
        latents = latents.to(self.connector.conv.weight.dtype)  # trainers hold theirs in any format
        views = at_view_rate(latents, self.config.view_rate, self.config.temporal_stride)
        x = self.connector(views)  # (B, D, S, h, w)
        b, _, s, h, w = x.shape
        patches = x.flatten(3).permute(0, 2, 3, 1)  # (B, S, h w, D)
        special = torch.cat([self.special[:1], self.special[1:].expand(s - 1, -1, -1)]).to(patches.dtype)
        prediction, raw = self.geometry.resume_raw(
            torch.cat([special.expand(b, -1, -1, -1), patches], 2), self.config.layer, (h, w)
        )
        step = self.config.temporal_stride if self.config.view_rate == "latent" else 1
        prediction.frame_index = torch.arange(s, device=latents.device) * step
        return prediction, raw

    def check_latents_of(self, spec: LatentSpec, vae: VAE | None = None) -> None:
        """Refuse to read the latents of another VAE: sizes, and the normalisation where both state it.

        Args:
            spec: of the latents.
            vae: what makes them, where it is at hand: VAEs of one size differ in their weights.

        Raises:
            UserError: names what differs.
        """
        config = self.config
        pairs: list[tuple[str, object, object]] = [
            ("channels", config.latent_channels, spec.channels),
            ("frames a latent frame", config.temporal_stride, spec.temporal_stride),
            ("pixels a latent cell", config.spatial_stride or spec.spatial_stride, spec.spatial_stride),
        ]
        for name, ours, stated in (("mean", config.latents_mean, spec.mean), ("std", config.latents_std, spec.std)):
            if ours and stated:
                same = len(ours) == len(stated) and all(
                    abs(a - b) <= 1e-4 * (1 + abs(a)) for a, b in zip(ours, stated, strict=True)
                )
                pairs.append((f"latents_{name}", "its own" if same else "its own, of other numbers", "its own"))
        if vae is not None and config.vae_sha256 is not None:
            pairs.append(("SHA-256 of its weights", config.vae_sha256[:12], vae_hash(vae)[:12]))
        for name, mine, theirs in pairs:
            if mine != theirs:
                raise UserError(
                    f"this LGM reads latents of the VAE {config.vae!r}, not of this video model's "
                    f"({name}: {mine} instead of {theirs}); use the LGM that was made for it, or `vggrpo train-lgm`"
                )

    def add_lora(self) -> None:
        """Freeze the geometry model and put a trainable LoRA on its layers (before the stitch point it idles)."""
        self.geometry.requires_grad_(False)
        if self.config.lora_rank:
            lora = LoraConfig(
                r=self.config.lora_rank, lora_alpha=self.config.lora_alpha, target_modules=self.geometry.lora_targets()
            )
            inject_adapter_in_model(lora, self.geometry)

    def merge_lora(self) -> None:
        """Fold the LoRA into the weights: the same function, without its cost. Can't be trained or saved afterwards.

        peft cannot fold 3D convolutions; those keep their LoRA beside them.
        """
        for module in self.geometry.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module.get_base_layer(), nn.Conv3d):
                module.merge()

    def parts(self) -> dict[str, Tensor]:
        """What is the LGM's own, as one flat dict: connector, special tokens, LoRA."""
        state = {f"connector.{k}": v for k, v in self.connector.state_dict().items()} | {"special": self.special}
        if self.config.lora_rank:
            state |= {f"lora.{k}": v for k, v in get_peft_model_state_dict(self.geometry).items()}
        return state

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `config.json` and `model.safetensors`: connector, special tokens, LoRA.

        The geometry model is referred to.
        """
        write_pretrained(
            directory, {"model_type": "latent_geometry_model"} | self.config.model_dump(), self.parts(), dtype
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> LatentGeometryModel:
        """Read what `save_pretrained` wrote, with the geometry model that it names; "embedded" is the shipped LGM.

        Ready for use, nothing requires gradients.

        Raises:
            UserError: missing or damaged files, or weights that do not fit the config.
        """
        directory = assets.path("lgm") if str(directory) == EMBEDDED else Path(directory)
        remedy = "make one with `vggrpo world pretrain lgm`, or copy it again"
        with reading("latent geometry model", directory, remedy):
            values = read_config(directory)
            values.pop("model_type", None)
            config = LGMConfig(**values)
            state = read_weights(directory)
            geometry = load_geometry_model(geometry_source(directory, config.geometry))
            _check_weights(config, geometry)
            model = cls(config, geometry)
            model.add_lora()
            model.load_state_dict_parts(state)
        model.merge_lora()
        return model.requires_grad_(False).eval()

    def load_state_dict_parts(self, state: dict[str, Tensor]) -> None:
        """Connector, special tokens and LoRA from one flat dict, as `parts` gives it."""
        lora = {k.removeprefix("lora."): v.float() for k, v in state.items() if k.startswith("lora.")}
        want = get_peft_model_state_dict(self.geometry) if self.config.lora_rank else {}
        want, have = want | {"special": self.special}, lora | {k: v for k, v in state.items() if k == "special"}
        require_names(
            sorted(want.keys() - have.keys()),
            sorted(have.keys() - want.keys()),
            [name for name in sorted(want.keys() & have.keys()) if want[name].shape != have[name].shape],
        )
        connector = {k.removeprefix("connector."): v for k, v in state.items() if k.startswith("connector.")}
        fill(self.connector, connector)
        self.special.copy_(state["special"])
        if lora:
            set_peft_model_state_dict(self.geometry, lora)

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels:
            raise UserError(
                f"latents of shape (B, {self.config.latent_channels}, T, H, W) of the VAE "
                f"{self.config.vae!r} are needed, got {tuple(latents.shape)}"
            )
        if not latents.is_meta and not torch.isfinite(latents).all():
            raise UserError("latents hold NaN or infinity; check the sampler or the file that they come from")


def _check_weights(config: LGMConfig, geometry: GeometryModel) -> None:
    """Refuse other weights of the same network: they load without a word, and connector and LoRA mean nothing there."""
    if config.geometry_sha256 not in (None, weights_hash(geometry)):  # type: ignore[arg-type]
        raise UserError(
            f"this LGM was made on other weights than those of {config.geometry} now; put those back, or make the LGM "
            "again with `vggrpo train-lgm`"
        )


def geometry_source(directory: Path, name: str) -> str | Path:
    """Where the geometry model `name` of the LGM in `directory` is: beside it, or wherever the name says."""
    beside = directory / name
    return beside if beside.exists() or name.startswith(".") else name


def load_teacher(directory: str | Path) -> GeometryModel:
    """The geometry model that an LGM was stitched from, as it was before; "embedded" is the shipped LGM's.

    Raises:
        UserError: as `LatentGeometryModel.from_pretrained`.
    """
    directory = assets.path("lgm") if str(directory) == EMBEDDED else Path(directory)
    with reading("latent geometry model", directory, "name a directory that `vggrpo train-lgm` wrote"):
        return load_geometry_model(geometry_source(directory, read_config(directory)["geometry"]))


def geometry_licence(directory: str | Path) -> str:
    """Licence of the geometry weights behind the LGM in `directory`, read off its config; nothing is loaded."""
    try:
        values = read_config(Path(directory))
        source = geometry_source(Path(directory), values["geometry"])
        return licence_of(source.resolve() if isinstance(source, Path) else source, values.get("backend", "vggt"))
    except (OSError, ValueError, KeyError):
        return f"unknown: no config of an LGM in {directory}"
