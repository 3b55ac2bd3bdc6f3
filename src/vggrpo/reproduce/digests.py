"""What a reproduction is made of, by content: names such as `tiny` and `embedded` stay while what they mean changes.

OUTPUT/settings.json   "digests": {"recipe tiny": "9f2c...", "weights of the LGM embedded": "07ab...", ...}
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vggrpo.config import RESUMABLE
from vggrpo.config_algorithms import Section
from vggrpo.config_lgm import RESUMABLE_LGM, load_lgm_config
from vggrpo.config_loading import flatten_config
from vggrpo.reproduce.lgms import geometry_behind, model_directory
from vggrpo.reproduce.settings import Settings

LARGE = 2**30  # bytes of a model's weights, above which their names and sizes must do
_WEIGHTS = {".safetensors", ".pt", ".pth", ".bin"}
_LENGTH = 12  # hex digits


def digests(settings: Settings, *, lgms: bool = False) -> dict[str, str]:
    """Digests by what they are of; weights that are no local directory (yet) have none.

    Args:
        settings: of the reproduction.
        lgms: it trains LGMs, so their recipe counts too.
    """
    recipe = settings.recipe()
    # How many updates a recipe has decides the budget of all arms, unlike in a run that is merely made longer.
    found: dict[str, str | None] = {
        f"recipe {settings.config}": config_digest(recipe, RESUMABLE - {"updates"}),
        f"weights of the pipeline {recipe.model.path}": weights_digest(model_directory(recipe.model.path, "pipeline")),
        f"weights of the LGM {recipe.lgm.path}": weights_digest(model_directory(recipe.lgm.path, "lgm")),
    }
    if (geometry := geometry_behind(recipe.lgm.path)) is not None:
        found[f"geometry model behind the LGM {recipe.lgm.path}"] = weights_digest(geometry)
    if lgms:
        lgm_recipe = load_lgm_config(settings.lgm_config)
        found[f"LGM recipe {settings.lgm_config}"] = config_digest(lgm_recipe, RESUMABLE_LGM - {"updates"})
    return {name: digest for name, digest in found.items() if digest is not None}


def config_digest(config: Section, leave_out: frozenset[str] = frozenset()) -> str:
    """Of all fields that are not at their default, so that a version with one more field changes nothing.

    Args:
        config: resolved.
        leave_out: dotted names of fields that do not decide results.
    """
    fields = flatten_config(config.model_dump(mode="json", exclude_defaults=True))
    kept = {name: value for name, value in fields.items() if name not in leave_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:_LENGTH]


def weights_digest(directory: Path) -> str | None:
    """Of a model's weights and configs (normalisation, schedule); of weights above 1 GB names and sizes. None: there
    are none. Cards and audits beside them are no part of the model."""
    files = [
        file for file in sorted(directory.rglob("*")) if file.suffix in _WEIGHTS or file.name.endswith("config.json")
    ]
    weights = [file.stat().st_size for file in files if file.suffix in _WEIGHTS]
    if not weights:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(directory)} {file.stat().st_size}\0".encode())
        if file.suffix not in _WEIGHTS or sum(weights) <= LARGE:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:_LENGTH]
