"""What a reward costs: through RGB (decode, then the geometry model) and through an LGM, by FLOPs, time and memory.

FLOPs are counted by `torch.utils.flop_counter` (a multiplication and an addition are two) and need no weights: on the
meta device the full shapes of Wan cost nothing. Time and memory are measured where the models are. What follows any
path, the rewards themselves, is a row of its own where there are numbers to judge.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vggrpo.lgm.cache import teacher_views
from vggrpo.lgm.model import LatentGeometryModel
from vggrpo.models.base import GeometryModel, LatentSpec
from vggrpo.models.vae import VAE
from vggrpo.rewards.registry import AUDITED, get_reward

Work = Callable[[], object]


def flops(work: Work) -> int:
    """Floating point operations of a call."""
    # torch's counter leaves out the one attention kernel that CPUs have.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        work()
    return int(counter.get_total_flops())


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def reward_paths(lgm: dict[str, LatentGeometryModel], vae: VAE, rgb: GeometryModel, latents: Tensor) -> dict[str, Work]:
    """The ways from latents to geometry: `rgb` at the latent view rate, `rgb_all_frames`, and each LGM by view rate;
    and `rewards`, both of the paper on the first LGM's geometry, unless the latents are on the meta device.

    Args:
        lgm: view rate -> model.
        latents: (B, C, T', H', W').
    """
    step = vae.latent_spec.temporal_stride

    def through_rgb(stride: int) -> Work:
        return lambda: rgb(teacher_views(vae.decode(latents), rgb, stride).float() / 255)

    paths = {"rgb": through_rgb(step)}
    if step > 1:
        paths["rgb_all_frames"] = through_rgb(1)
    paths |= {f"lgm_{rate}": (lambda model=model: model(latents)) for rate, model in lgm.items()}  # type: ignore[misc]
    if latents.is_meta:
        return paths
    geometry = cache(lambda: next(iter(lgm.values()))(latents))  # once, by the call that warms up
    return paths | {"rewards": lambda: [get_reward(name)(geometry()) for name in AUDITED]}


@torch.inference_mode()
def cost_table(paths: dict[str, Work], device: torch.device, repeats: int = 3) -> dict[str, dict[str, Any]]:
    """FLOPs, and on a real device the median seconds and (on CUDA) peak bytes of each path, each against `rgb`."""
    rows: dict[str, dict[str, Any]] = {}
    for name, work in paths.items():
        if device.type != "meta":
            work()  # warms up, and makes the geometry that `rewards` keeps: it is not to be counted as theirs
        row: dict[str, Any] = {"flops": flops(work)}
        if device.type != "meta":
            row["seconds"], row["peak_bytes"] = measure(work, device, repeats)
        rows[name] = row
    for row in rows.values():
        row["flops_of_rgb"] = row["flops"] / rows["rgb"]["flops"]
        if "seconds" in row:
            row["time_of_rgb"] = row["seconds"] / rows["rgb"]["seconds"]
    return rows


def measure(work: Work, device: torch.device, repeats: int = 3) -> tuple[float, int | None]:
    """Median seconds of `repeats` calls, which are not the first, and the peak of allocated bytes (CUDA only)."""
    cuda = device.type == "cuda"
    times = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times), torch.cuda.max_memory_allocated(device) if cuda else None


class MetaVAE:
    """A Wan VAE of a given config without weights, for counting."""

    def __init__(self, device: str | torch.device = "meta", **config: Any) -> None:
        from diffusers import AutoencoderKLWan

        with torch.device(device):
            self.model = AutoencoderKLWan(**config).eval().requires_grad_(False)
        values = self.model.config
        self.latent_spec = LatentSpec(values.z_dim, values.scale_factor_temporal, values.scale_factor_spatial)

    def encode_video(self, video: Tensor) -> Tensor:
        return self.model.encode(video * 2 - 1).latent_dist.mode()

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents, return_dict=False)[0] / 2 + 0.5


# The published sizes of the two base models: VAE and transformer, and the clip that the paper trains on.
WAN_2_1: dict[str, Any] = {
    "name": "Wan2.1-T2V-1.3B, 480x832x81, 16 channels",
    "clip": (81, 480, 832),
    "vae": {},  # diffusers' defaults are Wan2.1's
    "transformer": {
        "num_attention_heads": 12,
        "ffn_dim": 8960,
        "num_layers": 30,
        "in_channels": 16,
        "out_channels": 16,
    },
}
WAN_2_2: dict[str, Any] = {
    "name": "Wan2.2-TI2V-5B, 704x1280x121, 48 channels",
    "clip": (121, 704, 1280),
    "vae": {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "temperal_downsample": [False, True, True], "is_residual": True, "in_channels": 12, "out_channels": 12,
        "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
    },
    "transformer": {
        "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48
    },
}  # fmt: skip


def full_shape(
    model: dict[str, Any], geometry: Callable[[], GeometryModel], device: torch.device | str = "meta", layer: int = 0
) -> tuple[dict[str, LatentGeometryModel], MetaVAE, GeometryModel, Tensor]:
    """VAE, RGB model, an LGM of each view rate and one clip's latents at a base model's full shape, weights random.

    Args:
        model: `WAN_2_1` or `WAN_2_2`.
        geometry: makes the geometry model; called under `device`.
        layer: stitch point.
    """
    from vggrpo.lgm.model import LGMConfig

    with torch.device(device):
        vae = MetaVAE(device, **model["vae"])
        rgb: Any = geometry()
        rgb = rgb.eval().requires_grad_(False)
        spec = vae.latent_spec
        latents = torch.randn(1, *spec.latent_shape(*model["clip"]))
        lgms: dict[str, LatentGeometryModel] = {}
        for rate in ("latent", "frame"):
            config = LGMConfig(
                geometry="", vae=model["name"], latent_channels=spec.channels, temporal_stride=spec.temporal_stride,
                layer=layer, stride=16 // spec.spatial_stride, view_rate=rate, lora_rank=0, backend=rgb.model_type,
            )  # fmt: skip
            lgms[rate] = LatentGeometryModel(config, rgb).eval().requires_grad_(False)
    return lgms, vae, rgb, latents


def transformer_flops(model: dict[str, Any]) -> int:
    """FLOPs of one velocity prediction of one clip."""
    from diffusers import WanTransformer3DModel

    spec = MetaVAE(**model["vae"]).latent_spec
    with torch.device("meta"):
        network = WanTransformer3DModel(**model["transformer"]).eval().requires_grad_(False)
        latents = torch.randn(1, *spec.latent_shape(*model["clip"]))
        text, t = torch.randn(1, 512, 4096), torch.full((1,), 500.0)
    with torch.inference_mode():
        return flops(lambda: network(hidden_states=latents, timestep=t, encoder_hidden_states=text, return_dict=False))
