"""What a Wan transformer needs of a device's memory, by its shapes, and what the device has left.

`training_memory` states the formula; `benchmarks/full_shape.py --account` counts what autograd would keep. Estimates,
good to about a tenth.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vggrpo.errors import UserError

if TYPE_CHECKING:
    import torch

    from vggrpo.models.base import VideoModel

_GIB = 1024**3
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class TransformerShape:
    """Shape of a Wan transformer and its latents, enough to count parameters and activations.

    Attributes:
        dim: width of a token.
        ffn_dim: width inside the feed-forward layers.
        layers: number of blocks.
        spatial_stride: RGB pixels a latent pixel, along one side.
    """

    dim: int
    ffn_dim: int
    layers: int
    spatial_stride: int = 8

    @property
    def parameters(self) -> int:
        """Parameters of all blocks: self- and cross-attention (4 d^2 each) and the feed-forward layer (2 d f)."""
        return self.layers * (8 * self.dim**2 + 2 * self.dim * self.ffn_dim)

    def tokens(self, num_frames: int, height: int, width: int) -> int:
        """Tokens of one video: a latent frame per 4 frames after the first, and 2x2 latent pixels a token."""
        side = 2 * self.spatial_stride
        return ((num_frames - 1) // 4 + 1) * (height // side) * (width // side)


SHAPES = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": TransformerShape(1536, 8960, 30),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": TransformerShape(5120, 13824, 40),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": TransformerShape(3072, 14336, 30, spatial_stride=16),
}
ANY4D = 519_071_553  # parameters of the geometry model that the Wan recipes are for
# Parameters of UMT5-XXL's encoder, which all Wan pipelines share: embeddings, and 24 layers of attention (with norm and
# relative positions) and a gated feed-forward layer.
TEXT_ENCODER = 256384 * 4096 + 24 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64) + 4096


def pipeline_shape(path: str) -> TransformerShape:
    """Shape of a pipeline: of the table above by its hub name, else read from the directory's config files.

    Raises:
        UserError: when it is neither.
    """
    if path in SHAPES:
        return SHAPES[path]
    try:
        transformer, vae = (
            json.loads((Path(path) / part / "config.json").read_text()) for part in ("transformer", "vae")
        )
        dim = transformer["num_attention_heads"] * transformer["attention_head_dim"]
        stride = vae.get("scale_factor_spatial") or 8
        return TransformerShape(dim, transformer["ffn_dim"], transformer["num_layers"], stride)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no diffusers Wan directory with transformer/ and vae/config.json") from error


def block_values(shape: TransformerShape) -> int:
    """Values a token that autograd keeps of one block with LoRA, in units of the network's number format.

    `19 d + 3 f`, of which the LoRA's float32 copies of its inputs are a third of the first; `18 d` more with a time per
    token (Wan2.2-TI2V), whose modulation is float32. Within 5 % of what `benchmarks/full_shape.py --account` counts.
    """
    times = 18 * shape.dim if shape.spatial_stride == 16 else 0
    return 19 * shape.dim + 3 * shape.ffn_dim + times


def training_memory(
    shape: TransformerShape,
    tokens: int,
    *,
    rank: int,
    batch: int = 1,
    weight_bytes: int = 2,
    checkpointing: bool = True,
    full: bool = False,
    value_bytes: int | None = None,
) -> float:
    """Rough peak memory of an update in GiB, with an attention that keeps no score matrix.

    Sum of: the frozen weights; LoRA on the 8 attention projections of each block (fp32 weight, gradient and two Adam
    moments: 16 bytes each); and what the backward pass needs, `block_values` a token and block. With
    gradient checkpointing that holds for one block at a time, and of the others only the input is kept (`d` values).
    With full fine-tuning every weight has those 16 bytes and 4 of its reference. Not counted: text encoder and VAE,
    which are used before and after, and the geometry model.

    Args:
        shape: the transformer.
        tokens: tokens of one video, see `TransformerShape.tokens`.
        rank: LoRA rank.
        batch: videos (or denoising steps) in one backward pass.
        weight_bytes: of one weight, 2 for bfloat16.
        checkpointing: whether activations are recomputed.
        full: every weight is trained.
        value_bytes: of one activation; as `weight_bytes` if None.
    """
    weights = (20 if full else weight_bytes) * shape.parameters
    adapter = 0 if full else 16 * shape.layers * 8 * rank * 2 * shape.dim
    block = block_values(shape)
    values = shape.layers * shape.dim + block if checkpointing else shape.layers * block
    return (weights + adapter + (value_bytes or weight_bytes) * batch * tokens * values) / _GIB


def forward_memory(shape: TransformerShape, tokens: int, *, batch: int = 1, value_bytes: int = 2) -> float:
    """Peak memory in GiB of a forward pass without gradient, weights left out.

    `4.5 d + 2 f` values a token of one block; `19 d` more with a time per token (Wan2.2-TI2V), whose modulation is
    float32. Within 5 % of what `benchmarks/full_shape.py --account` counts.
    """
    times = 19 * shape.dim if shape.spatial_stride == 16 else 0
    return value_bytes * batch * tokens * (4.5 * shape.dim + 2 * shape.ffn_dim + times) / _GIB


def geometry_memory(num_frames: int, height: int, width: int) -> float:
    """Peak memory in GiB of reading one clip's geometry from latents with Any4D, weights left out.

    In float32, a view a latent frame: 11.7 kB a pixel of one view, which its dense heads take, and 142 B a pixel of
    every view. Within 5 % of what `benchmarks/full_shape.py --account` counts.
    """
    views = (num_frames - 1) // 4 + 1
    return height * width * (11700 + 142 * views) / _GIB


# Any4D's LoRA at rank 1, and the connector's weights a latent channel: 5x5x5 cells to 1024 numbers.
ANY4D_LORA, ANY4D_CONNECTOR = 742_453, 125 * 1024
# Bytes a pixel of the views whose dense maps are made at one time, and bytes a pixel of every view.
_RECOMPUTED, _KEPT, _KEPT_FLOAT32 = (23200, 1000), (5000, 10900), (5000, 15250)


def distillation_memory(
    views: int, height: int, width: int, *, clips: int = 1, checkpointing: bool = True, bf16: bool = True
) -> float:
    """Peak memory in GiB of a forward and backward pass over some clips of an LGM around Any4D, weights left out.

    Stitched before the first layer, with LoRA. With gradient checkpointing 1 kB a pixel of every view (the blocks'
    inputs, the maps and what the losses keep of them) and 23.2 kB a pixel, which the dense heads take for the eight
    views that they make at one time; without it 10.9 kB a pixel of every view, 15.3 kB with a trunk in float32. Within
    5 % of what `benchmarks/full_shape.py lgm-wan2.1-any4d --account` counts.

    Args:
        views: of one clip.
        height, width: of the video, pixels.
        clips: in one pass, `distill.micro_batch`.
        checkpointing: whether activations are made again in the backward pass.
        bf16: whether the trunk's are kept in bfloat16; the heads' are float32.
    """
    once, each = _RECOMPUTED if checkpointing else _KEPT if bf16 else _KEPT_FLOAT32
    return height * width * (once + each * views * clips) / _GIB


def shape_of(model: VideoModel) -> TransformerShape:
    """Shape of a loaded model.

    Raises:
        UserError: when its transformer does not say it as Wan's does.
    """
    config = getattr(model.transformer, "config", None)
    try:
        dim = config.num_attention_heads * config.attention_head_dim  # type: ignore[union-attr]
        return TransformerShape(dim, config.ffn_dim, config.num_layers, model.latent_spec.spatial_stride)  # type: ignore[union-attr]
    except AttributeError as error:
        raise UserError(
            "micro_batch: auto knows the memory of Wan transformers only; give sampling.micro_batch and "
            "grpo.micro_batch numbers"
        ) from error


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device: what is free on a GPU and in torch's own cache there; what
    the machine (or its container) has available, shared by the job's processes on it, elsewhere."""
    import psutil
    import torch

    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    left = min(psutil.virtual_memory().available, _left_in_container(_CGROUP))
    return int(left / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _left_in_container(folder: Path) -> float:
    """Bytes under the memory limit of a cgroup (version 2); infinite without a limit."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return float("inf") if limit == "max" else max(0.0, float(limit) - float(used))
    except (OSError, ValueError):
        return float("inf")
