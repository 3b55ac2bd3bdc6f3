"""Networks that are loaded from checkpoints, behind the two protocols of `vggrpo.models.base`. Imported lazily: see
`__getattr__`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "LatentSpec": "base",
    "VideoModel": "base",
    "GeometryModel": "base",
    "load_geometry_model": "loading",
    "WanVideoModel": "wan",
    "VGGT": "vggt",
    "Any4D": "any4d",
    "DepthAnything3": "depth_anything3",
    "AttributeClassifier": "attributes",
}

__all__ = [
    "VGGT",
    "Any4D",
    "AttributeClassifier",
    "DepthAnything3",
    "GeometryModel",
    "LatentSpec",
    "VideoModel",
    "WanVideoModel",
    "load_geometry_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
