"""One whole GRPO update at full shape with random weights: seconds by stage and peak memory.

    python benchmarks/full_shape.py wan2.1-t2v-1.3b data.num_frames=33 grpo.samples_per_prompt=8 [key=value ...]
    python benchmarks/full_shape.py wan2.1-t2v-1.3b --account       # without a GPU: count what autograd would keep
    python benchmarks/full_shape.py lgm-wan2.1-any4d --account      # the same for the training of an LGM
    python benchmarks/full_shape.py tiny --sweep cost.png           # seconds against videos, trained steps and tokens

Weights, text and prompts are random, so nothing is downloaded; the transformer has the recipe's own shape. The geometry
reader is the recipe's LGM where it is on this machine; else, on a GPU, an LGM of Any4D's full size with random weights,
which is paid for and not listened to; else nothing but maps of the video's size (`geometry_reader` in the output says
which). The rewards are computed in any case.

`--account` runs one block under torch's fake tensors (no memory, no arithmetic) and counts the bytes that autograd
keeps, with LoRA and merged text; `vggrpo doctor` estimates the same from a formula.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import cv2
import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vggrpo import assets
from vggrpo.config import EMBEDDED, TrainConfig, load_config
from vggrpo.config_algorithms import least_micro_batch
from vggrpo.config_lgm import TrainLGMConfig, load_lgm_config
from vggrpo.distributed import Processes
from vggrpo.geometry import GeometryPrediction
from vggrpo.io.atomic import atomic_write
from vggrpo.lgm import LatentGeometryModel
from vggrpo.lgm.losses import distillation_loss
from vggrpo.models.base import GeometryModel, LatentSpec
from vggrpo.models.border import patch_image_size
from vggrpo.models.loading import pick_device
from vggrpo.models.memory import (
    TransformerShape,
    block_values,
    distillation_memory,
    forward_memory,
    geometry_memory,
    pipeline_shape,
    training_memory,
)
from vggrpo.models.recompute import set_recompute
from vggrpo.models.wan import WanVideoModel
from vggrpo.posttraining.algorithm import Context
from vggrpo.posttraining.grpo import GRPO
from vggrpo.posttraining.policy import Policy
from vggrpo.reproduce.curves import panel
from vggrpo.tracking import Stopwatch

TEXT_DIM, TEXT_TOKENS = 4096, 60
_GIB = 1024**3
Reader = Callable[[Tensor], GeometryPrediction]


def build_transformer(shape: TransformerShape, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """A `WanTransformer3DModel` of that shape with random weights, on the current default device; what diffusers keeps
    in float32 when it loads a file stays float32."""
    from diffusers import WanTransformer3DModel

    channels = _channels(shape)
    head = 128 if shape.dim % 128 == 0 else 32  # Wan's; the embedded model's
    torch.set_default_dtype(dtype)
    try:
        transformer = WanTransformer3DModel(
            num_attention_heads=shape.dim // head,
            attention_head_dim=head,
            in_channels=channels,
            out_channels=channels,
            text_dim=TEXT_DIM,
            ffn_dim=shape.ffn_dim,
            num_layers=shape.layers if layers is None else layers,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in transformer.named_parameters():
        if any(part in name.split(".") for part in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    return transformer


def _channels(shape: TransformerShape) -> int:
    """Latent channels of Wan's VAE of that compression."""
    return 16 if shape.spatial_stride == 8 else 48


def random_text(batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Embeddings (B, 512, D) of texts of 60 tokens."""
    text = torch.zeros(batch, 512, TEXT_DIM, dtype=dtype, device=device)
    text[:, :TEXT_TOKENS] = torch.randn(TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    return text


def wrap(transformer: nn.Module, shape: TransformerShape) -> WanVideoModel:
    """The transformer as the trainer sees it, without text encoder and VAE."""
    spec = LatentSpec(transformer.config.in_channels, spatial_stride=shape.spatial_stride)
    scheduler = SimpleNamespace(config={})
    return WanVideoModel(transformer, scheduler, latent_spec=spec, expand_timesteps=shape.spatial_stride == 16)


def account(config: TrainConfig) -> dict[str, float]:
    """GiB that one backward pass of `grpo.micro_batch` videos keeps, and that a roll-out step of `sampling.micro_batch`
    holds at once: counted, and by the doctor's formulas."""
    shape = _shape(config)
    dtype = getattr(torch, config.model.dtype)
    kept = [_kept_bytes(config, shape, dtype, layers) for layers in (1, 2)]
    block, outside = kept[1] - kept[0], 2 * kept[0] - kept[1]
    batch, checkpointing = least_micro_batch(config.grpo.micro_batch), config.model.gradient_checkpointing
    tokens = shape.tokens(config.data.num_frames, config.data.height, config.data.width)
    inputs = dtype.itemsize * batch * tokens * shape.dim
    counted = outside + (block + shape.layers * inputs if checkpointing else shape.layers * block)
    estimate = training_memory(
        shape, tokens, rank=config.lora.rank, batch=batch, weight_bytes=dtype.itemsize, checkpointing=checkpointing
    ) - training_memory(shape, 0, rank=config.lora.rank, weight_bytes=dtype.itemsize)
    return {
        "tokens": tokens,
        "block_gib": block / _GIB,
        "values_a_token_and_block": block / (dtype.itemsize * batch * tokens),
        "formula_values": block_values(shape),
        "activations_gib": counted / _GIB,
        "doctor_gib": estimate,
        "rollout_gib": _forward_peak(config, shape, dtype) / _GIB,
        "doctor_rollout_gib": forward_memory(
            shape, tokens, batch=least_micro_batch(config.sampling.micro_batch), value_bytes=dtype.itemsize
        ),
    }


def account_geometry(config: TrainConfig) -> dict[str, float]:
    """GiB that the reward's geometry of one clip holds at once: counted, and by the doctor's formula."""
    data = config.data
    return {
        "geometry_gib": geometry_peak(config) / _GIB,
        "doctor_geometry_gib": geometry_memory(data.num_frames, data.height, data.width),
    }


def account_lgm(config: TrainLGMConfig) -> dict[str, float]:
    """GiB that one forward and backward pass of an LGM around Any4D holds at once: counted, and by the doctor's
    formula."""
    clips, distill = config.clips, config.distill
    formula = distillation_memory(
        clips.num_frames if config.stitch.view_rate == "frame" else (clips.num_frames - 1) // 4 + 1,
        clips.height,
        clips.width,
        clips=distill.micro_batch or distill.batch,
        checkpointing=distill.gradient_checkpointing,
        bf16=distill.bf16,
    )
    return {"distill_gib": distillation_peak(config) / _GIB, "doctor_distill_gib": formula}


def distillation_peak(config: TrainLGMConfig) -> int:
    """Most bytes that an update's pass over `distill.micro_batch` clips holds at once, stitched before the first layer:
    the teacher's maps, activations, gradients; weights left out."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from vggrpo.models.any4d import Any4D, Any4DConfig

    clips, distill, shape = config.clips, config.distill, pipeline_shape(config.video.path)
    count = distill.micro_batch or distill.batch
    size = patch_image_size((clips.height, clips.width))
    spec = LatentSpec(_channels(shape), spatial_stride=shape.spatial_stride)
    with torch.device("meta"):
        lgm = random_lgm(Any4D(Any4DConfig()), shape, lora_rank=distill.lora_rank, view_rate=config.stitch.view_rate)
        lgm.add_lora()
    lgm._check = lambda latents: None  # type: ignore[method-assign]  # fake values cannot be looked at
    lgm.connector.requires_grad_()
    lgm.train()
    set_recompute(lgm, distill.gradient_checkpointing)
    with FakeTensorMode():
        _become_fake(lgm)
        with _as_on_cuda(), _Peak() as peak:
            latents = torch.zeros(count, *spec.latent_shape(clips.num_frames, clips.height, clips.width))
            with torch.autocast("cpu", torch.bfloat16) if distill.bf16 else nullcontext():
                prediction, raw = lgm.predict(latents)
            pixels = (count, prediction.depth.shape[1], *size)
            teacher = GeometryPrediction.from_depth(
                prediction.cam2world.detach(),
                prediction.intrinsics.detach(),
                torch.ones(pixels),
                torch.ones(pixels),
                scene_flow=torch.zeros(*pixels, 3),
                dynamic_mask=torch.zeros(pixels, dtype=torch.bool),
            )
            loss, _ = distillation_loss(prediction, raw, teacher, distill.weights, torch.zeros(*pixels, 3))
            loss.backward()
    return peak.most


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """A GPU's choices for what claims to be on a CPU: attention that keeps no scores; norms in float32 under
    autocast."""
    norm = functional.layer_norm

    def in_float32(x: Tensor, *options: Any, **named: Any) -> Tensor:
        return norm(x.float() if torch.is_autocast_enabled("cpu") else x, *options, **named)

    with (
        patch("vggrpo.models.vit_layers.attend", functional.scaled_dot_product_attention),
        patch("torch.nn.functional.layer_norm", in_float32),
    ):
        yield


def _kept_bytes(config: TrainConfig, shape: TransformerShape, dtype: torch.dtype, layers: int) -> int:
    """Bytes of distinct storages that autograd keeps of a forward pass with so many layers, weights left out."""
    kept: dict[int, int] = {}
    with _fake_forward(config, shape, dtype, layers, config.grpo.micro_batch) as (transformer, forward):
        weights = {parameter.untyped_storage()._cdata for parameter in transformer.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            forward()
    return sum(kept.values())


def _forward_peak(config: TrainConfig, shape: TransformerShape, dtype: torch.dtype) -> int:
    """Most bytes that a forward pass without gradient holds at once in one block, weights left out."""
    fake = _fake_forward(config, shape, dtype, 1, config.sampling.micro_batch)
    with fake as (_, forward), torch.no_grad(), _Peak() as peak:
        forward()
    return peak.most


def geometry_peak(config: TrainConfig) -> int:
    """Most bytes that reading one clip's geometry with an LGM around Any4D holds at once, weights left out."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from vggrpo.models.any4d import Any4D, Any4DConfig

    shape, data = _shape(config), config.data
    with FakeTensorMode():
        lgm = random_lgm(Any4D(Any4DConfig()), shape)
        lgm._check = lambda latents: None  # type: ignore[method-assign]  # fake values cannot be looked at
        spec = LatentSpec(_channels(shape), spatial_stride=shape.spatial_stride)
        latents = torch.zeros(1, *spec.latent_shape(data.num_frames, data.height, data.width))
        with torch.no_grad(), _Peak() as peak:
            lgm.predict(latents)
    return peak.most


class _Peak(TorchDispatchMode):
    """Bytes of the storages that operations inside have made and that are still alive, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.alive = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._known:
                    self._known[storage._cdata] = storage.nbytes()
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata)
        self.most = max(self.most, self.alive)
        return result

    def _free(self, storage: int) -> None:
        self.alive -= self._known.pop(storage)


@contextmanager
def _fake_forward(
    config: TrainConfig, shape: TransformerShape, dtype: torch.dtype, layers: int, micro_batch: int | Literal["auto"]
) -> Iterator[tuple[nn.Module, Callable[[], Tensor]]]:
    """A transformer of so many layers with LoRA under fake tensors, and its forward pass as `predict_velocity` does it,
    without the look at the text's values, which fake tensors lack."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        transformer = build_transformer(shape, dtype, layers)
    model = wrap(transformer, shape)
    transformer.add_adapter(LoraConfig(r=config.lora.rank, target_modules=list(config.lora.targets)))
    with FakeTensorMode():
        _become_fake(transformer)
        size = model.latent_spec.latent_shape(config.data.num_frames, config.data.height, config.data.width)
        batch = least_micro_batch(micro_batch)
        latents, times = torch.zeros(batch, *size), torch.zeros(batch)
        text = torch.zeros(batch, TEXT_TOKENS + 1, TEXT_DIM)  # as merging leaves it

        def forward() -> Tensor:
            output = transformer(
                hidden_states=latents.to(dtype),
                timestep=model._timesteps(latents, times),
                encoder_hidden_states=text.to(dtype),
                return_dict=False,
            )[0]
            assert output.shape == latents.shape
            return output

        yield transformer, forward


def _become_fake(module: nn.Module) -> None:
    """Meta tensors -> fake ones that claim to be on the CPU, so that attention takes the path that keeps no scores."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    trained = "lora_" in name or tensor.requires_grad
                    fake = nn.Parameter(fake.float() if trained else fake, requires_grad=trained)
                tensors[name] = fake


def _grpo(config: TrainConfig) -> tuple[GRPO, torch.device, str]:
    """The algorithm with random weights of the recipe's shape, its device, and what reads the geometry."""
    device = pick_device(config.model.device)
    shape = _shape(config)
    with device:
        transformer = build_transformer(shape, getattr(torch, config.model.dtype))
    model = wrap(transformer, shape)
    processes = Processes.join()
    policy = Policy(config, model, processes)
    reader, reader_name = _reader(config, device)
    conditions = SimpleNamespace(
        text=lambda prompts, where: random_text(len(prompts), where, transformer.dtype),
        first_frames=lambda prompts, where: None,
        has_first_frames=False,
    )
    prompts = [f"prompt {i}" for i in range(2 * config.grpo.prompts_per_update)]
    context = Context(config, model, policy, reader, prompts, conditions, processes)  # type: ignore[arg-type]
    return GRPO(context), device, reader_name


def measure(config: TrainConfig) -> dict[str, Any]:
    """Seconds by stage, peak memory and the reward's share of one update, after one that warms up."""
    grpo, device, reader_name = _grpo(config)
    result: dict[str, Any] = {}
    for number in range(2):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        watch = Stopwatch(device)
        with watch.stage("total"):
            metrics = grpo.update(number, watch)
        result = {f"seconds/{name}": seconds for name, seconds in watch.seconds.items()}
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
    videos = config.grpo.prompts_per_update * config.grpo.samples_per_prompt
    return result | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "videos": videos,
        "tokens": _shape(config).tokens(config.data.num_frames, config.data.height, config.data.width),
        "reward_share": result["seconds/reward"] / result["seconds/total"],
        "geometry_reader": reader_name,
        "grad_norm": metrics["grad_norm"],
        "ratio_deviation": metrics["ratio_deviation"],
    }


def sweep(recipe: str, overrides: Sequence[str], plot: Path, repeats: int = 3) -> dict[str, Any]:
    """Seconds of an update with one of videos, trained steps and tokens at once to four times the recipe's.

    Of the reward the network is left out. On a CPU these are seconds of the process, which other work on the
    machine does not add to; the median of `repeats` updates. Writes a plot with the straight line through the points,
    whose R^2 is in the result.
    """
    base = load_config(recipe, [*overrides, "lgm.path=none"])
    k, window, frames = base.grpo.samples_per_prompt, base.sampling.window, (base.data.num_frames - 1) // 4 + 1
    tokens = _shape(base).tokens(base.data.num_frames, base.data.height, base.data.width)
    factors = (1, 2, 3, 4)
    steps = {"num_steps": 4 * window + 1, "window_last": 4 * window - 1}
    axes = {
        "videos a group": (k, [f"grpo.samples_per_prompt={k * n}" for n in factors]),
        "trained steps": (window, [f"sampling={steps | {'window': window * n}}" for n in factors]),
        "tokens": (tokens, [f"data.num_frames={4 * (frames * n - 1) + 1}" for n in factors]),
    }
    result: dict[str, Any] = {}
    for axis, (one, settings) in axes.items():
        configs = [load_config(recipe, [*overrides, "lgm.path=none", setting]) for setting in settings]
        times = [statistics.median(_update_seconds(config, repeats)) for config in configs]
        result[axis] = {"sizes": [one * n for n in factors], "seconds": times, "r2_of_a_line": _line(times)[1]}
    panels = []
    for axis, found in result.items():
        measured = list(zip(found["sizes"], found["seconds"], strict=True))
        line = list(zip(found["sizes"], _line(found["seconds"])[0], strict=True))
        panels.append(panel("seconds an update", {"straight line": line, "measured": measured}, [], [], unit=axis))
    atomic_write(plot, cv2.imencode(".png", np.concatenate(panels, axis=1))[1].tobytes())
    return result


def _update_seconds(config: TrainConfig, repeats: int) -> list[float]:
    grpo, device = _grpo(config)[:2]
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = []
    for number in range(1 + repeats):  # the first one warms up
        watch, start = Stopwatch(device), clock()
        with watch.stage("total"):  # waits for a GPU
            metrics = grpo.update(number, watch)
        seconds.append(clock() - start)
        if not metrics["grad_norm"]:
            raise SystemExit("nothing was trained: no reward was valid; take clips of at least three latent frames")
    return seconds[1:]


def _line(times: Sequence[float]) -> tuple[list[float], float]:
    """The least-squares line at equally spaced points, and its R^2."""
    y = torch.tensor(times, dtype=torch.float64)
    x = torch.stack([torch.ones_like(y), torch.arange(len(y), dtype=torch.float64)], dim=1)
    line = x @ torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    return line.tolist(), float(1 - (y - line).square().sum() / (y - y.mean()).square().sum())


def _shape(config: TrainConfig) -> TransformerShape:
    return pipeline_shape(str(assets.path("pipeline")) if config.model.path == EMBEDDED else config.model.path)


def _reader(config: TrainConfig, device: torch.device) -> tuple[Reader, str]:
    """What the recipe's rewards read geometry with, and its name."""
    if config.lgm.path == EMBEDDED or Path(config.lgm.path).is_dir():
        folder = assets.path("lgm") if config.lgm.path == EMBEDDED else Path(config.lgm.path)
        return LatentGeometryModel.from_pretrained(folder).to(device).eval().requires_grad_(False), str(folder)
    maps = partial(_maps, (config.data.height, config.data.width))
    if device.type != "cuda" or config.lgm.path == "none":
        return maps, "maps without a network"
    from vggrpo.models.any4d import Any4D, Any4DConfig

    with device:
        geometry = Any4D(Any4DConfig())
    return random_reader(geometry, _shape(config), maps), "Any4D with random weights"


def random_reader(geometry: GeometryModel, shape: TransformerShape, maps: Reader) -> Reader:
    """An LGM around `geometry` that is run on the latents, in bfloat16, before `maps` answers: random weights see
    nothing that a reward could judge."""
    device = geometry.special_tokens(0).device
    lgm = random_lgm(geometry, shape).to(device)

    def read(latents: Tensor) -> GeometryPrediction:
        with torch.autocast(device.type, torch.bfloat16):
            lgm(latents)
        return maps(latents)

    return read


def random_lgm(geometry: GeometryModel, shape: TransformerShape, **options: Any) -> LatentGeometryModel:
    """An LGM around `geometry` for the latents of a transformer of that shape."""
    from vggrpo.lgm.model import LGMConfig

    config = LGMConfig(
        geometry="", vae="random", latent_channels=_channels(shape), stride=16 // shape.spatial_stride,
        backend=geometry.model_type, **{"lora_rank": 0} | options,
    )  # fmt: skip
    return LatentGeometryModel(config, geometry).eval().requires_grad_(False)


def _maps(size: tuple[int, int], latents: Tensor) -> GeometryPrediction:
    """Geometry that depends on the latents: one view a latent frame, depth maps of the video's (height, width), as an
    LGM draws them; rewards cost what they will cost."""
    batch, views = latents.shape[0], latents.shape[2]
    depth = 3 + torch.tanh(functional.interpolate(latents[:, 0].float(), size, mode="bilinear")) * 0.1
    cameras = torch.eye(4, device=latents.device).repeat(batch, views, 1, 1)
    cameras[..., :3, 3] = latents.float().mean(dim=(3, 4)).transpose(1, 2)[..., :3].cumsum(1)
    cameras[:, 0] = torch.eye(4, device=latents.device)
    rows, columns = depth.shape[-2:]
    lens = torch.tensor([[columns, 0, columns / 2], [0, columns, rows / 2], [0, 0, 1.0]], device=latents.device)
    return GeometryPrediction.from_depth(cameras, lens.expand(batch, views, 3, 3), depth, torch.ones_like(depth))


def main() -> None:
    """Print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe's name or file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--account", action="store_true", help="count memory without a GPU")
    parser.add_argument("--sweep", type=Path, metavar="PNG", help="cost against size, with a plot")
    arguments = parser.parse_args()
    if arguments.account and Path(arguments.recipe).stem.startswith("lgm-"):
        print(json.dumps(account_lgm(load_lgm_config(arguments.recipe, arguments.overrides)), indent=1))
        return
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["stop={}", *arguments.overrides, f"output={folder}"]
        if arguments.sweep is not None:
            print(json.dumps(sweep(arguments.recipe, overrides, arguments.sweep), indent=1))
            return
        config = load_config(arguments.recipe, overrides)
        found = account(config) | account_geometry(config) if arguments.account else measure(config)
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
