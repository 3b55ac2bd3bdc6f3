"""Weights that are used here but not shipped, and what their publishers allow: read before anything is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vggrpo import assets
from vggrpo.config import EMBEDDED

_SHIPPED = Path(assets.__file__).resolve().parent


@dataclass(frozen=True)
class Weights:
    """Weights that are not shipped here.

    Attributes:
        repository: where they are, `owner/name` on the Hugging Face hub.
        role: what they do here.
        licence: as their publisher states it; "not stated" where the model card names none.
        free: whether commercial use is allowed without asking.
    """

    repository: str
    role: str
    licence: str
    free: bool = False


WEIGHTS = (
    Weights("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "video model", "Apache-2.0", free=True),
    Weights("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "video model", "Apache-2.0", free=True),
    Weights("facebook/VGGT-1B", "geometry, static scenes", "CC BY-NC 4.0: non-commercial"),
    Weights(
        "facebook/VGGT-1B-Commercial", "geometry, static scenes", "VGGT licence: commercial, not military, on request"
    ),
    Weights("depth-anything/DA3-LARGE-1.1", "geometry, static scenes", "CC BY-NC 4.0: no commercial use"),
    Weights("depth-anything/DA3-BASE", "geometry, static scenes", "Apache-2.0", free=True),
    Weights("depth-anything/DA3-SMALL", "geometry, static scenes", "Apache-2.0", free=True),
    Weights("airlabshare/any4d-checkpoint", "geometry, moving scenes", "not stated: ask the authors"),
)

# What is known of weights that lie in a folder of any name, by the kind of network.
_BY_KIND = {
    "wan": "Wan2.1 and Wan2.2 are Apache-2.0",
    "vggt": "VGGT-1B is CC BY-NC 4.0 (non-commercial), VGGT-1B-Commercial has Meta's VGGT licence",
    "any4d": "Any4D's is not stated: ask its authors",
    "depth_anything_3": "Depth Anything 3 small and base are Apache-2.0, large and giant CC BY-NC 4.0 (non-commercial)",
}


def is_known(source: str | Path) -> bool:
    """Whether this is the hub id of weights whose licence is known by name."""
    return str(source).lower() in {weights.repository.lower() for weights in WEIGHTS}


def licence_of(source: str | Path, kind: str) -> str:
    """Licence of weights: by their hub id, else what is known of public weights of that kind.

    Args:
        source: hub id, a directory or file, or "embedded".
        kind: a geometry model's `model_type`, or "wan".
    """
    if str(source) == EMBEDDED or _SHIPPED in Path(source).resolve().parents:
        return "Apache-2.0, shipped with vggrpo"
    known = {weights.repository.lower(): weights.licence for weights in WEIGHTS}
    public = f" (public weights of this kind: {_BY_KIND[kind]})" if kind in _BY_KIND else ""
    return known.get(str(source).lower(), f"as the publisher of {source} states{public}")
