"""What this machine can run: versions, devices, memory each recipe needs, weights that are missing and their licences.

The memory of a recipe is an estimate from its shapes, not a measurement (`training_memory` states the formula). It is
there to tell "fits" from "far too large" before anything is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from vggrpo.models.licences import WEIGHTS, Weights

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "av", "opencv-python-headless", "plotly")
RECIPES = ("tiny", "wan2.1-t2v-1.3b", "wan2.2-ti2v-5b")
_GIB = 1024**3


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
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": TransformerShape(3072, 14336, 30, spatial_stride=16),
}


def pipeline_shape(path: str) -> TransformerShape:
    """Shape of a pipeline: of the table above by its hub name, else read from the directory's config files.

    Raises:
        UserError: when it is neither.
    """
    from vggrpo.errors import UserError

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


def training_memory(
    shape: TransformerShape,
    tokens: int,
    *,
    rank: int,
    batch: int = 1,
    weight_bytes: int = 2,
    checkpointing: bool = True,
) -> float:
    """Rough peak memory of LoRA training in GiB, with an attention that keeps no score matrix.

    Sum of: the frozen weights; LoRA on the 8 attention projections of each block (fp32 weight, gradient and two Adam
    moments: 16 bytes each); and what the backward pass needs, about `14 d + 3 f` values a token and block. With
    gradient checkpointing that holds for one block at a time, and of the others only the input is kept (`d` values).
    Not counted: text encoder and VAE, which are used before and after, and the geometry model.

    Args:
        shape: the transformer.
        tokens: tokens of one video, see `TransformerShape.tokens`.
        rank: LoRA rank.
        batch: videos (or denoising steps) in one backward pass.
        weight_bytes: of one weight and of one activation, 2 for bfloat16.
        checkpointing: whether activations are recomputed.
    """
    weights = weight_bytes * shape.parameters
    adapter = 16 * shape.layers * 8 * rank * 2 * shape.dim
    block = 14 * shape.dim + 3 * shape.ffn_dim
    values = shape.layers * shape.dim + block if checkpointing else shape.layers * block
    return (weights + adapter + weight_bytes * batch * tokens * values) / _GIB


def recipe_memory(name: str) -> float:
    """`training_memory` of a shipped recipe, in GiB.

    Raises:
        UserError: when the recipe or its pipeline is missing.
    """
    from vggrpo.assets import path
    from vggrpo.config import EMBEDDED, load_config

    config = load_config(name)
    pipeline = str(path("pipeline")) if config.model.path == EMBEDDED else config.model.path
    shape = pipeline_shape(pipeline)
    return training_memory(
        shape,
        shape.tokens(config.data.num_frames, config.data.height, config.data.width),
        rank=config.lora.rank,
        batch=config.grpo.micro_batch,
        weight_bytes=4 if config.model.dtype == "float32" else 2,
        checkpointing=config.model.gradient_checkpointing,
    )


def is_cached(repository: str, cache: Path | None = None) -> bool:
    """Whether a snapshot of `owner/name` is in the hub's cache on this machine (nothing is asked over the network)."""
    if cache is None:
        home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
        cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    snapshots = cache / f"models--{repository.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed version of each package, or "not installed"."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def devices() -> list[str]:
    """One line a device that torch can use, the best one first."""
    import torch

    lines = []
    for index in range(torch.cuda.device_count()):
        name, (free, total) = torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)
        lines.append(f"cuda:{index}  {name}, {free / _GIB:.0f} of {total / _GIB:.0f} GiB free")
    if torch.backends.mps.is_available():
        lines.append("mps  Apple GPU")
    lines.append(f"cpu  {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    return lines


def embedded_models() -> dict[str, str]:
    """Each shipped model and where it is, or what to do about a missing one."""
    from vggrpo.assets import NAMES, path
    from vggrpo.errors import UserError

    found = {}
    for name in NAMES:
        try:
            found[name] = str(path(name))
        except UserError as error:
            found[name] = f"missing: {error}"
    return found


def report() -> str:
    """The whole report as plain text."""
    import psutil

    from vggrpo import __version__

    memory = psutil.virtual_memory()
    sections = [
        ("vggrpo", [f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"]),
        ("packages", _table(package_versions())),
        ("devices", devices()),
        ("memory", [f"{memory.available / _GIB:.0f} of {memory.total / _GIB:.0f} GiB free"]),
        ("embedded models (Apache-2.0, shipped; `vggrpo demo` needs nothing else)", _table(embedded_models())),
        ("memory that each recipe needs, estimated", _table({name: _recipe_line(name) for name in RECIPES})),
        ("weights for large models, not shipped", [_weights_line(weights) for weights in WEIGHTS]),
    ]
    return "\n".join("\n".join([title, *(f"  {line}" for line in lines), ""]) for title, lines in sections)


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"{name:<{width}}  {value}" for name, value in rows.items()]


def _recipe_line(name: str) -> str:
    from vggrpo.errors import UserError

    try:
        return f"about {recipe_memory(name):.1f} GiB"
    except UserError as error:
        return f"unknown: {error}"


def _weights_line(weights: Weights) -> str:
    state = "in the cache" if is_cached(weights.repository) else "missing"
    return f"{weights.repository:<34} {weights.role:<24} {state:<12}  {weights.licence}"
