"""The study of where an LGM is stitched and how many views it reads: LGMs of one recipe and equal training.

    OUTPUT/lgms/ARM               the LGMs, shared with table `lgm`
    OUTPUT/stitch.{json,md,png}   their errors on rendered clips that none was trained on, against the RGB model's

No video model is tuned: what an LGM sees is the question, not what a policy makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vggrpo.evaluation.lgm_analysis import analyze_lgm
from vggrpo.reproduce.cells import Say
from vggrpo.reproduce.curves import error_panels
from vggrpo.reproduce.lgms import about_lgm, trained_lgm
from vggrpo.reproduce.recipes import STITCHED, Arm
from vggrpo.reproduce.results import number_cell, study_page
from vggrpo.reproduce.settings import Settings

CLIPS = 64
ERRORS = ("abs_rel", "translation", "rotation", "fov", "flow")


def study_stitching(folder: Path, settings: Settings, common: Mapping[str, Any], say: Say) -> Path:
    """Train and measure the LGMs that are missing, and write the results."""
    rows = {arm.name: _row(arm, folder, settings, say) for arm in STITCHED}
    panels = error_panels({name: row["accuracy"] for name, row in rows.items()}, ERRORS)
    return study_page(folder, "stitch", dict(common) | {"lgms": rows}, _lines(rows), [panels])


def _row(arm: Arm, folder: Path, settings: Settings, say: Say) -> dict[str, Any]:
    say(f"LGM {arm.name}")
    directory = trained_lgm(arm, settings, folder)
    kept = folder / "stitch" / arm.name / "analysis.json"
    if not kept.is_file():
        recipe = settings.recipe()
        analyze_lgm(
            directory,
            kept.parent,
            video_model=recipe.model.path,
            clips=2 if settings.quick else CLIPS,
            num_frames=recipe.data.num_frames,
            size=(recipe.data.height, recipe.data.width),
            parts=("accuracy",),
            device=settings.device,
        )
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return {
        "about": arm.about,
        "layer": config["layer"],
        "view_rate": config["view_rate"],
        "accuracy": json.loads(kept.read_text(encoding="utf-8"))["accuracy"],
        "training": about_lgm(arm, folder)["card"],
    }


def _lines(rows: Mapping[str, Any]) -> list[str]:
    lines = ["Mean error on rendered clips that nothing was trained on, and in brackets as a multiple of the RGB "
             "model's on the same views.", "",
             "| LGM | what | layer | views | updates | clips | " + " | ".join(ERRORS) + " |",
             "|" + "---|" * (6 + len(ERRORS))]  # fmt: skip
    for name, row in rows.items():
        found, card = row["accuracy"], row["training"]
        cells = [f"{number_cell(found['lgm'].get(e))} ({number_cell(found['ratio'].get(e))})" for e in ERRORS]
        about = (name, row["about"], row["layer"], row["view_rate"], card["updates"], card["clips"])
        lines += ["| " + " | ".join([*(str(value) for value in about), *cells]) + " |"]
    return [*lines, ""]
