"""Which device, and which directory: what every command that loads a video or geometry model asks first."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from vggrpo import assets
from vggrpo.config import EMBEDDED
from vggrpo.errors import UserError
from vggrpo.models.base import GeometryModel, LatentSpec
from vggrpo.models.licences import is_known, licence_of
from vggrpo.models.pretrained import is_hub_id, read_config, read_weights, reading
from vggrpo.models.vae import VAE, ImageVAE
from vggrpo.models.wan import WanVAE, WanVideoModel, read_latent_spec

logger = logging.getLogger(__name__)

# A geometry backend: its `model_type`, the class that has `from_checkpoint`, and a name that only its public weights
# have (they come without a `model_type`).
_BACKENDS = {
    "vggt": ("vggrpo.models.vggt", "VGGT", "aggregator.camera_token"),
    "any4d": ("vggrpo.models.any4d", "Any4D", "scene_flow_dpt_regressor_head.conv1.weight"),
    "depth_anything_3": (
        "vggrpo.models.depth_anything3",
        "DepthAnything3",
        "model.backbone.pretrained.camera_token",
    ),
}
_FILES = ["config.json", "*.safetensors", "*.pt", "*.pth"]


def load_video_model(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    local_rank: int = 0,
    load_vae: bool = True,
    load_text: bool = True,
) -> WanVideoModel:
    """Load a diffusers Wan directory, a hub id, or the shipped pipeline ("embedded")."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {dtype!r}; use float32 or bfloat16")
    return WanVideoModel.from_pretrained(
        assets.path("pipeline") if str(path) == EMBEDDED else path,
        pick_device(device, local_rank),
        getattr(torch, dtype),
        load_vae=load_vae,
        load_text=load_text,
    )


def latent_spec(path: str | Path) -> LatentSpec:
    """The latents of a video model that `load_video_model` would load, without loading it."""
    return read_latent_spec(assets.path("pipeline") if str(path) == EMBEDDED else path)


def load_vae(path: str | Path, *, device: str = "auto") -> VAE:
    """A VAE by its directory: an image autoencoder (`*_encoder.pth`), or that of a video model at any other path.

    The video model's transformer and text encoder are not loaded.
    """
    if Path(path).is_dir() and any(Path(path).glob("*_encoder.*")):
        return ImageVAE.from_pretrained(path, pick_device(device))
    return WanVAE.from_pretrained(assets.path("pipeline") if str(path) == EMBEDDED else path, pick_device(device))


def load_geometry_model(source: str | Path) -> GeometryModel:
    """A frozen geometry network in float32: one saved here, or a public checkpoint of one of the backends.

    Args:
        source: a directory with `config.json` and weights, a weights file, a hub id such as `facebook/VGGT-1B`, or
            "embedded" for the shipped one.

    Raises:
        UserError: nothing there, an unknown kind of network, or weights that do not fit; one line.
    """
    remedy = "name a directory or hub id of a geometry model, or copy it again"
    with reading("geometry model", source, remedy):
        path = _local(source)
        if not path.exists():
            raise FileNotFoundError(2, "no such directory", str(path))
        config = read_config(path) if (path / "config.json").is_file() else {}
        kind = config.get("model_type")
        if kind is not None and kind not in _BACKENDS:
            raise UserError(f"{source} holds a model of type {kind!r}, none of {', '.join(_BACKENDS)}; {remedy}")
        state = read_weights(path)
        kind = kind or _recognised(state, source)
        module, name, _ = _BACKENDS[kind]
        return getattr(import_module(module), name).from_checkpoint(config, state)


def _recognised(state: dict[str, Tensor], source: str | Path) -> str:
    for kind, (_, _, telltale) in _BACKENDS.items():
        if telltale in state:
            if not is_known(source):  # of what is known by its hub id it was said before
                logger.warning("%s holds weights of %s; licence: %s", source, kind, licence_of(source, kind))
            return kind
    names = ", ".join(list(state)[:3])
    raise UserError(
        f"the {len(state)} weights in {source} ({names}, ...) are those of no known geometry model "
        f"({', '.join(_BACKENDS)}), and no config.json names its model_type; name another checkpoint"
    )


def _local(source: str | Path) -> Path:
    """The path itself, or a snapshot of the hub, for which the licence is shown first."""
    if str(source) == EMBEDDED:
        return assets.path("geometry")
    if Path(source).exists() or not is_hub_id(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    logger.warning("weights of %s; licence: %s", source, licence_of(source, "unknown"))
    try:
        return Path(snapshot_download(str(source), allow_patterns=_FILES))
    except Exception as error:  # the hub's client has a dozen kinds of its own, httpx and requests more
        raise UserError(
            f"no geometry model in {source}: no such directory here, and the hub gives none "
            f"({type(error).__name__}); check the name, the network, and whether its licence must be accepted first"
        ) from error


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """ "auto" is this process's own GPU, or the CPU where there is none; "cuda" is its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name!r} is no device; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"the device is {name} but torch sees no CUDA GPU; use auto or cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"torch cannot compute on the device {name} here; use auto, cpu or cuda") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
