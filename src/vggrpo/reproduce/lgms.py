"""LGMs that an arm trains for itself, before it reads rewards through them: once for all its training seeds.

    OUTPUT/lgms/ARM/lgm   the model, its errors (card.json) and its reward audit (audit.json)

All of them come from one recipe with the same number of clips and updates, so what differs is what the arm changes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vggrpo import assets
from vggrpo.config import EMBEDDED
from vggrpo.config_lgm import TrainLGMConfig, load_lgm_config
from vggrpo.errors import UserError
from vggrpo.evaluation.audit import audit_reward
from vggrpo.lgm.model import geometry_source
from vggrpo.models.pretrained import read_config
from vggrpo.pretraining.distill import train_lgm
from vggrpo.reproduce.recipes import Arm
from vggrpo.reproduce.settings import Settings, lgm_folder
from vggrpo.rewards.registry import audited_options

AUDIT_CLIPS = 48
_QUICK = (
    "updates=1", "save_every=1", "clips.max_clips=3", "clips.micro_batch=2", "clips.generated_steps=2",
    "stitch.max_clips=2", "stitch.layer=0", "distill.batch=2", "distill.lora_rank=2",
)  # fmt: skip


def lgm_config(arm: Arm, settings: Settings, folder: Path) -> TrainLGMConfig:
    """The LGM recipe with the arm's changes, on as many clips as the recipe has, whatever share is generated.

    Raises:
        UserError: the recipe is for another video model than the one that is tuned.
    """
    quick = _QUICK if settings.quick else ()
    recipe, tuned = load_lgm_config(settings.lgm_config, quick), settings.recipe()
    if recipe.video.path != tuned.model.path:
        raise UserError(
            f"the LGM recipe {settings.lgm_config} is for the video model {recipe.video.path}, and {settings.config} "
            f"tunes {tuned.model.path}; name its own with --lgm-config"
        )
    overrides = [*quick, *(arm.lgm or ()), f"output={lgm_folder(arm, folder)}", f"video.device={settings.device}"]
    config = load_lgm_config(settings.lgm_config, overrides)
    clips = recipe.clips.max_clips / (1 - recipe.clips.generated_share)
    real = max(2, round(clips * (1 - config.clips.generated_share)))
    return load_lgm_config(settings.lgm_config, [*overrides, f"clips.max_clips={real}"])


def trained_lgm(arm: Arm, settings: Settings, folder: Path) -> Path:
    """The directory of the arm's LGM, trained if that has not been done."""
    config = lgm_config(arm, settings, folder)
    directory = Path(config.output) / "lgm"
    if not (directory / "card.json").is_file():  # the last thing that training writes
        train_lgm(config, progress=not settings.quick)
    return directory


def audited_lgm(arm: Arm, settings: Settings, folder: Path) -> Path:
    """`trained_lgm`, audited if that has not been done, as training asks before it reads rewards through it."""
    directory, recipe = trained_lgm(arm, settings, folder), settings.recipe()
    # Other video models have no judge that comes along; `vggrpo audit-reward --judge` takes one.
    if recipe.model.path == EMBEDDED and not (directory / "audit.json").is_file():
        data = recipe.data
        audit_reward(
            directory,
            directory,
            clips=4 if settings.quick else AUDIT_CLIPS,
            num_frames=data.num_frames,
            size=(data.height, data.width),
            options=audited_options(recipe.rewards),
        )
    return directory


def model_directory(path: str, name: str) -> Path:
    """Where the model is that a recipe names by `path`: the shipped one called `name` for "embedded"."""
    return assets.path(name) if path == EMBEDDED else Path(path)


def geometry_behind(lgm: str) -> Path | None:
    """Directory of the geometry model that an LGM was made from; None where it is not on this disk, or no LGM is there
    (yet)."""
    directory = model_directory(lgm, "lgm")
    try:
        source = geometry_source(directory, read_config(directory)["geometry"])
    except (OSError, ValueError, KeyError):
        return None
    local = model_directory(str(source), "geometry")
    return local if local.is_dir() else None


def about_lgm(arm: Arm, folder: Path) -> dict[str, Any]:
    """What is known of the arm's LGM: errors on held-out clips, updates, and its audit."""
    found: dict[str, Any] = {}
    for name in ("card", "audit"):
        file = lgm_folder(arm, folder) / "lgm" / f"{name}.json"
        if file.is_file():
            found[name] = json.loads(file.read_text(encoding="utf-8"))
    return found
