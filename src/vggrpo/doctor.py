"""What this machine can run: versions, devices, memory each recipe needs, weights that are missing and their licences.

The memory of a recipe is an estimate from its shapes, not a measurement (`vggrpo.models.memory` states the formula). It
is there to tell "fits" from "far too large" before anything is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path

from vggrpo.models.licences import WEIGHTS, Weights
from vggrpo.models.memory import (
    ANY4D,
    ANY4D_CONNECTOR,
    ANY4D_LORA,
    TEXT_ENCODER,
    distillation_memory,
    forward_memory,
    geometry_memory,
    pipeline_shape,
    training_memory,
)

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
LGM_RECIPES = ("lgm-wan2.1-any4d", "lgm-wan2.2-any4d")
_GIB = 1024**3


def recipe_memory(name: str) -> dict[str, float]:
    """Memory in GiB that each stage of a shipped recipe needs on one GPU, without `model.shard`:

    "encode": transformer and text encoder together, once, before the first update, until the prompts are cached;
    "roll-out": transformer, the states of all videos (unless `sampling.offload`), and a forward pass
    (`forward_memory`); "reward": transformer, states, and the geometry of `lgm.micro_batch` clips (`geometry_memory`;
    not for the embedded recipe, whose network is small); "update": `training_memory` and the states. All but the first
    hold the geometry model's weights: the embedded one's, or those of Any4D in float32. `micro_batch: auto` counts as
    1, the least that it falls back to.

    Raises:
        UserError: when the recipe or its pipeline is missing.
    """
    from vggrpo.assets import path
    from vggrpo.config import EMBEDDED, load_config
    from vggrpo.config_algorithms import least_micro_batch

    config = load_config(name)
    embedded = config.model.path == EMBEDDED
    shape = pipeline_shape(str(path("pipeline")) if embedded else config.model.path)
    tokens = shape.tokens(config.data.num_frames, config.data.height, config.data.width)
    size, full = 4 if config.model.dtype == "float32" else 2, config.model.tune == "full"
    channels = 16 if shape.spatial_stride == 8 else 48
    samples = config.grpo.prompts_per_update * config.grpo.samples_per_prompt
    state = 4 if config.sampling.trajectory_dtype == "float32" else 2
    kept = 0 if config.sampling.offload else samples * (config.sampling.window + 1) * tokens * 4 * channels * state
    calls = least_micro_batch(config.sampling.micro_batch) * (2 if config.sampling.guidance_scale != 1 else 1)
    weights = (4 if full else size) * shape.parameters
    forward = forward_memory(shape, tokens, batch=calls, value_bytes=size)
    small = config.lgm.path == EMBEDDED
    files = [file for part in ("lgm", "geometry") for file in path(part).rglob("*.safetensors")] if small else []
    geometry = (2 * sum(file.stat().st_size for file in files) if small else 4 * ANY4D) / _GIB  # stored in float16
    data = config.data
    reading = 0.0 if small else geometry_memory(data.num_frames, data.height, data.width) * config.lgm.micro_batch
    return {
        "encode": (weights + (0 if embedded else size * TEXT_ENCODER)) / _GIB,
        "roll-out": (weights + kept) / _GIB + forward + geometry,
        "reward": (weights + kept) / _GIB + reading + geometry,
        "update": kept / _GIB
        + geometry
        + training_memory(
            shape,
            tokens,
            rank=config.lora.rank,
            batch=least_micro_batch(config.grpo.micro_batch),
            weight_bytes=size,
            checkpointing=config.model.gradient_checkpointing,
            full=full,
        ),
    }


def lgm_recipe_memory(name: str) -> dict[str, float]:
    """Memory in GiB that each stage of a shipped LGM recipe around Any4D needs on one GPU:

    "cache": transformer and text encoder of the generator, Any4D in float32, and a forward pass of the generator
    (`forward_memory`) or Any4D's reading of `clips.micro_batch` clips, whichever takes more; what the VAE works with is
    not counted. "distill": Any4D, LoRA and connector (fp32 weight, gradient and two Adam moments: 16 bytes each) and
    `distillation_memory` of `distill.micro_batch` clips; nothing of the generator is left then. The layer search
    between the two keeps the tokens of one layer at a time.

    Raises:
        UserError: when the recipe or its pipeline is missing.
    """
    from vggrpo.config_lgm import load_lgm_config

    config = load_lgm_config(name)
    clips, distill, shape = config.clips, config.distill, pipeline_shape(config.video.path)
    size, channels = 4 if config.video.dtype == "float32" else 2, 16 if shape.spatial_stride == 8 else 48
    views = clips.num_frames if config.stitch.view_rate == "frame" else (clips.num_frames - 1) // 4 + 1
    generates = clips.generated_share > 0
    tokens = shape.tokens(clips.num_frames, clips.height, clips.width)
    velocity = forward_memory(shape, tokens, batch=2 if clips.guidance_scale > 1 else 1, value_bytes=size)
    reading = clips.micro_batch * geometry_memory(clips.num_frames, clips.height, clips.width)
    trained = distill.lora_rank * ANY4D_LORA + channels * ANY4D_CONNECTOR
    weights = size * (shape.parameters + generates * TEXT_ENCODER) + 4 * ANY4D
    return {
        "cache": weights / _GIB + max(velocity * generates, reading),
        "distill": (4 * ANY4D + 16 * trained) / _GIB
        + distillation_memory(
            views,
            clips.height,
            clips.width,
            clips=distill.micro_batch or distill.batch,
            checkpointing=distill.gradient_checkpointing,
            bf16=distill.bf16,
        ),
    }


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
        ("memory that each recipe needs, estimated", _table(_recipe_lines())),
        ("weights for large models, not shipped", [_weights_line(weights) for weights in WEIGHTS]),
    ]
    return "\n".join("\n".join([title, *(f"  {line}" for line in lines), ""]) for title, lines in sections)


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"{name:<{width}}  {value}" for name, value in rows.items()]


def _recipe_lines() -> dict[str, str]:
    return {name: _recipe_line(name, recipe_memory) for name in RECIPES} | {
        name: _recipe_line(name, lgm_recipe_memory) for name in LGM_RECIPES
    }


def _recipe_line(name: str, estimate: Callable[[str], dict[str, float]]) -> str:
    from vggrpo.errors import UserError

    try:
        stages = estimate(name)
    except UserError as error:
        return f"unknown: {error}"
    parts = ", ".join(f"{stage} {size:.1f}" for stage, size in stages.items())
    peak = max(stages.values())
    return f"about {peak:.1f} GiB ({parts})" if peak >= 1 else f"about {peak * 1024:.0f} MiB"


def _weights_line(weights: Weights) -> str:
    state = "in the cache" if is_cached(weights.repository) else "missing"
    return f"{weights.repository:<34} {weights.role:<24} {state:<12}  {weights.licence}"
