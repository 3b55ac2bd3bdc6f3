"""Run recipes: train their arms, generate the same prompts and seeds with each, evaluate, compare with the base model.

    OUTPUT/TABLE.{json,md,png}     results
    OUTPUT/runs, lgms, SET         what they are made of, see `cells`

Everything goes through the functions behind `train`, `train-lgm`, `generate`, `evaluate` and `compare`, each of which
keeps what it finished, so a second call goes on where the first one stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vggrpo.errors import UserError
from vggrpo.evaluation import summarise_comparison
from vggrpo.evaluation.benchmarks import load_prompt_sets
from vggrpo.io.atomic import ensure_directory
from vggrpo.models.loading import pick_device
from vggrpo.reproduce.arms import chosen_arms, objections
from vggrpo.reproduce.cells import (
    BASE,
    Row,
    Say,
    compared,
    measured,
    paired,
    run_by_run,
    spent,
    training_seeds,
)
from vggrpo.reproduce.digests import digests
from vggrpo.reproduce.hacking import study_hacking
from vggrpo.reproduce.judging import check_judges, left_out
from vggrpo.reproduce.lgms import about_lgm, lgm_config
from vggrpo.reproduce.recipes import STITCHED, STUDIES, TABLES, VGGRPO, Arm, Table, arm_named
from vggrpo.reproduce.results import machine, write_results
from vggrpo.reproduce.settings import Settings, check_settings, known_digests
from vggrpo.reproduce.stitching import study_stitching


def reproduce(
    names: Sequence[str],
    output: Path | str,
    settings: Settings | None = None,
    *,
    arms: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Run recipes and write their results.

    Args:
        names: of `TABLES` and `STUDIES`.
        output: directory; what it holds of an interrupted reproduction is used.
        settings: sizes.
        arms: only these arms (empty: all).
        say: gets one line a step.

    Returns:
        The Markdown files.

    Raises:
        UserError: for unknown names, or a directory that holds a reproduction with other settings, or with another
            content of the recipe or the weights; for an arm of `arms` that makes no sense with the recipe, and for a
            judge that is missing.
    """
    settings = settings or Settings()
    settings.recipe()  # fail before any work, here and below
    chosen = {name: chosen_arms(name, arms, settings) for name in checked_names(names, arms)}
    load_prompt_sets(settings.sets)
    pick_device(settings.device)
    check_judges(settings)
    with_lgm = [arm for table in chosen.values() for arm in table if arm.lgm is not None]
    own_lgm = {arm.name: arm for arm in [*with_lgm, *(STITCHED if "stitch" in names else ())]}.values()
    for arm in own_lgm:
        lgm_config(arm, settings, Path(output))
    made_of = digests(settings, lgms=bool(own_lgm))
    folder = ensure_directory(output)
    check_settings(folder / "settings.json", settings, made_of)
    for line in notes(names, arms, settings):
        say(line)
    return [
        _study(name, folder, settings, say)
        if name in STUDIES
        else _table(name, TABLES[name], folder, settings, chosen[name], say)
        for name in names
    ]


def checked_names(names: Sequence[str], arms: Sequence[str]) -> Sequence[str]:
    """The names.

    Raises:
        UserError: for a table, or an arm, that does not exist.
    """
    known = [*TABLES, *STUDIES]
    for name in names:
        if name not in known:
            raise UserError(f"no table {name!r}; there are {', '.join(known)}")
    unknown = set(arms) - {arm.name for name in names if name in TABLES for arm in TABLES[name].arms}
    if unknown:
        known = list(dict.fromkeys(arm.name for name in names if name in TABLES for arm in TABLES[name].arms))
        raise UserError(
            f"no arm {sorted(unknown)[0]!r} in {', '.join(names)}; there are {', '.join(known) or 'none to choose'}"
        )
    return names


def notes(names: Sequence[str], only: Sequence[str], settings: Settings) -> list[str]:
    """A line for each arm, and one for all metrics, that this recipe leaves out."""
    lines = [
        f"left out of {name}: {arm}: {reason}"
        for name in names
        if name in TABLES and not only
        for arm, reason in objections(name, settings).items()
    ]
    return [*lines, *filter(None, [left_out(settings)])]


def _table(name: str, table: Table, folder: Path, settings: Settings, chosen: Sequence[Arm], say: Say) -> Path:
    result: dict[str, Any] = {
        "table": name, "title": table.title, "claim": table.claim, **_provenance(folder, settings),
        "arms": {arm.name: {"about": arm.about} for arm in chosen}, "sets": {},
    }  # fmt: skip
    sets = settings.sets or table.sets
    owners = [arm_named(arm.lora_of) for arm in chosen if arm.lora_of]
    everything: dict[str, list[list[Row]]] = {}  # rows of all sets by arm, one list a training seed
    for prompt_set in sets:
        runs = {
            arm.name: [
                measured(arm, s, prompt_set, folder, settings, say) for s in range(training_seeds(arm, settings))
            ]
            for arm in {arm.name: arm for arm in [BASE, *chosen, *owners]}.values()
        }
        result["sets"][prompt_set] = {
            arm.name: compared(arm, BASE, runs, [prompt_set], folder, settings) for arm in chosen
        }
        for each, found in runs.items():
            before = everything.get(each, [[] for _ in found])
            everything[each] = [a + b for a, b in zip(before, found, strict=True)]
    if len(sets) > 1:  # all prompts together: what a claim is made of
        result["sets"][" + ".join(sets)] = {
            arm.name: compared(arm, BASE, everything, sets, folder, settings) for arm in chosen
        }
    if owners:
        result["owners"] = {
            arm.name: compared(arm, arm_named(arm.lora_of), everything, sets, folder, settings) | {"owner": arm.lora_of}
            for arm in chosen
            if arm.lora_of
        }
    if VGGRPO in chosen:
        rivals = [arm.name for arm in chosen if arm is not VGGRPO and arm.train is not None]
        result["against"] = {rival: _ahead(everything[rival], everything[VGGRPO.name]) for rival in rivals}
    for arm in chosen:
        result["arms"][arm.name] |= spent(arm, folder, settings)
        if arm.lgm is not None:
            result["arms"][arm.name]["lgm"] = about_lgm(arm, folder)
    return write_results(folder, name, result)


def _provenance(folder: Path, settings: Settings) -> dict[str, Any]:
    """What a page has to say of how it was made: sizes, machine, and recipe and weights by their content."""
    return {"settings": settings.record(), "machine": machine(), "made_of": known_digests(folder / "settings.json")}


def _ahead(rival: Sequence[Sequence[Row]], ours: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Differences of ours from a rival's, over all training seeds and in each."""
    return summarise_comparison(paired(rival, ours), runs=run_by_run(rival, ours))


def _study(name: str, folder: Path, settings: Settings, say: Say) -> Path:
    common = {"table": name, "title": STUDIES[name], **_provenance(folder, settings)}
    if name == "hacking":
        return study_hacking(folder, settings, common, say)
    if name == "stitch":
        return study_stitching(folder, settings, common, say)
    return write_results(folder, name, common | {"found": _analysis(name, folder, settings)})


def _analysis(name: str, folder: Path, settings: Settings) -> dict[str, Any]:
    """Efficiency and robustness: what `vggrpo analyze-lgm` measures."""
    from vggrpo.evaluation.lgm_analysis import analyze_lgm

    config = settings.recipe()
    parts = {"efficiency": ["cost"] if settings.quick else ["cost", "full-shape"], "robustness": ["noise"]}[name]
    return analyze_lgm(
        config.lgm.path,
        folder / name,
        video_model=config.model.path,
        clips=1 if settings.quick else 32,
        num_frames=config.data.num_frames,
        size=(config.data.height, config.data.width),
        parts=parts,
        device=settings.device,
    )
