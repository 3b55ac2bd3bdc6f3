"""What this machine can run: versions, devices, memory each recipe needs, weights that are missing and their licences.

The memory of a recipe is an estimate from its shapes, not a measurement (`training_memory` states the formula, and
`benchmarks/full_shape.py --account` counts what autograd would keep). It is
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
RECIPES = (
    "tiny",
    "wan2.1-t2v-1.3b",
    "wan2.1-t2v-1.3b-1gpu-24gb",
    "wan2.1-t2v-1.3b-1gpu-80gb",
    "wan2.2-ti2v-5b",
    "wan2.2-ti2v-5b-1gpu-24gb",
    "wan2.2-ti2v-5b-1gpu-80gb",
)
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
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": TransformerShape(5120, 13824, 40),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": TransformerShape(3072, 14336, 30, spatial_stride=16),
}
# Parameters of UMT5-XXL's encoder, which all Wan pipelines share: embeddings, and 24 layers of attention (with norm and
# relative positions) and a gated feed-forward layer.
TEXT_ENCODER = 256384 * 4096 + 24 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64) + 4096


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


def recipe_memory(name: str) -> dict[str, float]:
    """Memory in GiB that each stage of a shipped recipe needs on one GPU, without `model.shard`:

    "encode": transformer and text encoder together, once, before the first update, until the prompts are cached;
    "roll-out": transformer, the states of all videos (unless `sampling.offload`), and a forward pass of about
    `8 d + 2 f` values a token; "update": `training_memory` and the same states; "geometry model": added to both where
    its weights are on this machine, else left out.

    Raises:
        UserError: when the recipe or its pipeline is missing.
    """
    from vggrpo.assets import path
    from vggrpo.config import EMBEDDED, load_config

    config = load_config(name)
    embedded = config.model.path == EMBEDDED
    shape = pipeline_shape(str(path("pipeline")) if embedded else config.model.path)
    tokens = shape.tokens(config.data.num_frames, config.data.height, config.data.width)
    size, full = 4 if config.model.dtype == "float32" else 2, config.model.tune == "full"
    channels = 16 if shape.spatial_stride == 8 else 48
    samples = config.grpo.prompts_per_update * config.grpo.samples_per_prompt
    kept = 0 if config.sampling.offload else samples * (config.sampling.window + 1) * tokens * 4 * channels * 4
    calls = config.sampling.micro_batch * (2 if config.sampling.guidance_scale != 1 else 1)
    weights = (4 if full else size) * shape.parameters
    forward = size * calls * tokens * (8 * shape.dim + 2 * shape.ffn_dim)
    lgm = path("lgm") if config.lgm.path == EMBEDDED else Path(config.lgm.path)
    geometry = sum(file.stat().st_size for file in lgm.rglob("*.safetensors")) / _GIB if lgm.is_dir() else 0.0
    stages = {
        "encode": (weights + (0 if embedded else size * TEXT_ENCODER)) / _GIB,
        "roll-out": (weights + kept + forward) / _GIB + geometry,
        "update": kept / _GIB
        + geometry
        + training_memory(
            shape,
            tokens,
            rank=config.lora.rank,
            batch=config.grpo.micro_batch,
            weight_bytes=size,
            checkpointing=config.model.gradient_checkpointing,
            full=full,
        ),
    }
    return stages | ({"geometry model": geometry} if geometry else {})


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
        stages = recipe_memory(name)
    except UserError as error:
        return f"unknown: {error}"
    parts = ", ".join(f"{stage} {size:.1f}" for stage, size in stages.items() if stage != "geometry model")
    known = "" if "geometry model" in stages else "; without the geometry model, which is not here"
    peak = max(stages.values())
    return f"about {peak:.1f} GiB ({parts}{known})" if peak >= 1 else f"about {peak * 1024:.0f} MiB"


def _weights_line(weights: Weights) -> str:
    state = "in the cache" if is_cached(weights.repository) else "missing"
    return f"{weights.repository:<34} {weights.role:<24} {state:<12}  {weights.licence}"
