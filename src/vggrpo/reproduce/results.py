"""Results of a recipe as JSON, Markdown and a picture: differences from the base model with their intervals."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from vggrpo.evaluation import HEADLINE
from vggrpo.evaluation.metrics.quality import KERNEL_DISTANCE
from vggrpo.evaluation.summary import FEWEST_PROMPTS, FEWEST_SEEDS
from vggrpo.io.atomic import atomic_write, atomic_write_json
from vggrpo.reproduce.curves import cost_panels, noise_panels, stacked, write_picture

SHOWN = (*HEADLINE, "flow_cycle", "camera_acceleration", "adherence", KERNEL_DISTANCE, "motion_flow",
         "motion_reward", "geometry_reward")  # fmt: skip
FEWEST_MARKED = 8  # an interval of fewer prompts earns no mark
ALPHA = 0.05
TOO_FEW = "too few prompts"
MARKS = (
    f"▲ better, ▼ worse: {' and '.join(HEADLINE)}, which were fixed beforehand, where the 95 % interval leaves out "
    f"zero; other independent scores where p after Holm's correction is below {ALPHA:g}. Rewards, which training "
    "optimised, motion_flow, a guard, and kernel_distance, which has a margin of its own, bear no mark."
)
_GREEN, _RED, _GREY, _BLACK = (60, 140, 40), (50, 50, 200), (150, 150, 150), (30, 30, 30)  # BGR


def machine() -> dict[str, Any]:
    """What the numbers were made on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vggrpo": version("vggrpo"),
    }


def write_results(folder: Path, name: str, result: Mapping[str, Any]) -> Path:
    """Write `NAME.json`, `NAME.md` and `NAME.png` of a table or an analysis; returns the Markdown."""
    if "sets" in result:
        atomic_write_json(folder / f"{name}.json", dict(result))
        write_picture(folder / f"{name}.png", forest(result))
        return atomic_write(folder / f"{name}.md", _markdown(result, f"{name}.png"))
    found = result["found"]
    return study_page(folder, name, result, _analysis_lines(found), _analysis_panels(found))


def _markdown(result: Mapping[str, Any], picture: str) -> str:
    lines = [f"# {result['title']}", "", f"The paper: {result['claim']}", ""]
    lines += [*quick_note(result), f"![differences]({picture})", "", MARKS, ""]
    lines += ["kernel_distance is that of the training seed whose interval reaches furthest over its margin, and "
              "quality is judged by it.", ""]  # fmt: skip
    for prompt_set, rows in result["sets"].items():
        lines += [f"## {prompt_set}", "", "Difference from the base model, mean over prompts [95 % interval].", ""]
        lines += [*_differences(rows, with_base=True), *_closely(_metrics_of(rows), "base / arm")]
    lines += _against(result.get("against", {}))
    lines += _owners(result.get("owners", {}))
    lines += [*_exactly_off(result["sets"]), *_budgets(result["arms"]), *_lgms(result["arms"])]
    return "\n".join([*lines, *footer(result)]) + "\n"


def _differences(rows: Mapping[str, Any], *, with_base: bool) -> list[str]:
    """Arms by metrics; `with_base`: under the values of the base model, which is what all of them are compared with."""
    names = _shown(_metrics_of(rows))
    lines = ["| arm | " + " | ".join(_head(name, rows) for name in names) + " | motion ratio | counts |"]
    lines += ["|" + "---|" * (len(names) + 3)]
    if with_base:
        first = next(iter(rows.values()))["metrics"]
        bases = " | ".join(number_cell(first.get(name, {}).get("base")) for name in names)
        lines += [f"| base | {bases} | 1 | |"]
    for arm, row in rows.items():
        cells = " | ".join(difference_cell(name, row["metrics"].get(name)) for name in names)
        lines += [f"| {arm} | {cells} | {number_cell(row['motion_ratio'])} | {_counts_cell(row)} |"]
    return [*lines, ""]


def _counts_cell(row: Mapping[str, Any]) -> str:
    """Whether an improvement counts; whether it is the sample alone that keeps it from that."""
    if row["counts"]:
        return "yes"
    failed = [name for name, check in row["checks"].items() if check["outcome"] is not True]
    return TOO_FEW if failed == ["sample"] else "no"


def _closely(arms: Mapping[str, Mapping[str, Any]], sides: str) -> list[str]:
    """What stands behind a headline difference, and behind that of the kernel distance: every training seed by itself,
    and for the headline also the win rate, failures and the pairs that move alike.

    Args:
        arms: metrics by arm.
        sides: whose failures, such as "base / arm".
    """
    lines = ["By training seed, in their order; win rate over prompts, a tie counts half; failures: videos of all "
             "training seeds without a valid number; among pairs that move alike (ratio 0.8 to 1.25).", "",
             f"| arm | metric | by training seed | win rate | failures, {sides} | motion-matched |",
             "|" + "---|" * 6]  # fmt: skip
    for arm, metrics in arms.items():
        for name in [name for name in (*HEADLINE, KERNEL_DISTANCE) if name in metrics]:
            entry = metrics[name]
            failures = [entry.get(f"failures_{side}") for side in ("base", "tuned")]
            cells = [
                _seeds_cell(entry.get("by_training_seed", ())),
                "-" if entry.get("win_rate") is None else f"{entry['win_rate']:.0%}",
                "-" if None in failures else f"{failures[0]} / {failures[1]}",
                _matched_cell(entry.get("motion_matched")),
            ]
            lines += [f"| {arm} | {name} | " + " | ".join(cells) + " |"]
    return [*lines, ""]


def _metrics_of(rows: Mapping[str, Any]) -> dict[str, Any]:
    return {arm: row["metrics"] for arm, row in rows.items()}


def _shown(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Metrics that some arm has, in the order of the tables."""
    return [name for name in SHOWN if any(name in metrics for metrics in arms.values())]


def _against(rivals: Mapping[str, Any]) -> list[str]:
    """VGGRPO minus each other trained arm, over the prompts of all sets."""
    names = _shown(rivals)
    if not names:
        return []
    lines = ["## VGGRPO against each arm", "", "VGGRPO minus the arm, mean over all prompts [95 % interval].", ""]
    lines += ["| arm | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for arm, metrics in rivals.items():
        lines += [f"| {arm} | " + " | ".join(difference_cell(name, metrics.get(name)) for name in names) + " |"]
    return [*lines, "", *_closely(rivals, "arm / VGGRPO")]


def _owners(rows: Mapping[str, Any]) -> list[str]:
    """Arms that sample with another arm's LoRA minus that arm, over the prompts of all sets."""
    if not rows:
        return []
    named = {f"{arm} - {row['owner']}": row for arm, row in rows.items()}
    lines = ["## Against the arm whose LoRA it samples with", ""]
    lines += ["Difference from that arm with the same training seed, mean over all prompts [95 % interval].", ""]
    return [*lines, *_differences(named, with_base=False), *_closely(_metrics_of(named), "owner / arm")]


def _budgets(arms: Mapping[str, Any]) -> list[str]:
    """What each arm spent in training, and what a video costs to sample."""
    lines = ["## Arms and budgets", "", "| arm | what | training videos | updates | training seconds | seconds a video "
             "| network passes a video | gradients a video |", "|" + "---|" * 8]  # fmt: skip
    for arm, about in arms.items():
        cost = about.get("sampling", {})
        numbers = [about.get(f"training_{name}") for name in ("videos", "updates", "seconds")]
        numbers += [cost.get(f"{name}_per_video") for name in ("seconds", "network_passes")]
        gradients = [cost.get(f"{name}_gradients_per_video") for name in ("network", "reward")]
        cells = [number_cell(number) for number in numbers]
        cells.append(
            " + ".join(f"{n} {word}" for n, word in zip(gradients, ("network", "LGM"), strict=True) if n) or "-"
        )
        lines += [f"| {arm} | {about['about']} | " + " | ".join(cells) + " |"]
    return [*lines, ""]


def _exactly_off(sets: Mapping[str, Any]) -> list[str]:
    """Which guided arms made the base model's own latents."""
    found: dict[str, bool] = {}
    for rows in sets.values():
        for arm in [arm for arm, row in rows.items() if "equal_to_base" in row]:
            found[arm] = found.get(arm, True) and rows[arm]["equal_to_base"]
    if not found:
        return []
    equal = [arm for arm, same in found.items() if same]
    return [f"Latents equal to the base model's, bit for bit: {', '.join(equal) or 'none'}.", ""]


def _lgms(arms: Mapping[str, Any]) -> list[str]:
    """Errors and audits of the LGMs that arms trained for themselves."""
    made = {arm: about["lgm"] for arm, about in arms.items() if about.get("lgm")}
    if not made:
        return []
    errors = sorted({name for lgm in made.values() for name in lgm["card"]["heldout_errors_against_teacher"]})
    lines = ["## LGMs of the arms", "",
             "Errors on held-out clips against the teacher; the reward audit: floor over base, agreement of `e_geo` "
             "with the truth of rendered and with the judge on generated clips.", ""]  # fmt: skip
    lines += ["| arm | updates | clips | " + " | ".join(errors) + " | floor / base | truth | judge |"]
    lines += ["|" + "---|" * (len(errors) + 6)]
    for arm, lgm in made.items():
        card, audit = lgm["card"], lgm.get("audit", {})
        numbers = [card["updates"], card["clips"], *(card["heldout_errors_against_teacher"].get(n) for n in errors)]
        numbers += [audit.get("ratio"), *(audit.get(f"spearman_{who}", {}).get("e_geo") for who in ("truth", "judge"))]
        lines += [f"| {arm} | " + " | ".join(number_cell(number) for number in numbers) + " |"]
    return [*lines, ""]


def study_page(
    folder: Path,
    name: str,
    result: Mapping[str, Any],
    lines: Sequence[str],
    panels: Sequence[Sequence[np.ndarray]],
) -> Path:
    """Write `NAME.json`, `NAME.png` and `NAME.md` of a study whose tables are `lines` and whose picture is rows of
    `panels`; returns the Markdown.
    """
    atomic_write_json(folder / f"{name}.json", dict(result))
    write_picture(folder / f"{name}.png", stacked(panels))
    head = [f"# {result['title']}", "", *quick_note(result), f"![{name}]({name}.png)", ""]
    return atomic_write(folder / f"{name}.md", "\n".join([*head, *lines, *footer(result)[2:]]) + "\n")


def _analysis_lines(found: Mapping[str, Any]) -> list[str]:
    """Tables of what `vggrpo analyze-lgm` found."""
    lines = _noise_table(found["noise"], found["reference"]) if "noise" in found else []
    for shape, paths in found.get("cost", {}).items():
        lines += [f"Geometry of one clip, {shape}.", "", "| path | TFLOP | of RGB | seconds | of RGB | peak GiB |"]
        lines += ["|---|---|---|---|---|---|"]
        for path, row in paths.items():
            peak = row.get("peak_bytes")
            numbers = (row["flops"] / 1e12, row["flops_of_rgb"], row.get("seconds"), row.get("time_of_rgb"),
                       None if peak is None else peak / 2**30)  # fmt: skip
            lines += [f"| {path} | " + " | ".join(number_cell(number) for number in numbers) + " |"]
        lines += ["", *(f"Of a {path} the latent reward's geometry is {row['latent_share']:.1%}.\n"
                        for path, row in paths.items() if "latent_share" in row)]  # fmt: skip
    return lines


def _analysis_panels(found: Mapping[str, Any]) -> list[list[np.ndarray]]:
    """Their pictures, a row for noise and one for each shape whose cost was measured."""
    noise = [noise_panels(found["noise"])] if "noise" in found else []
    return noise + [cost_panels(shape, paths) for shape, paths in found.get("cost", {}).items()]


def _noise_table(noise: Mapping[str, Any], reference: str) -> list[str]:
    """Errors of both ways at every noise level, the LGM's first."""
    names = list(noise["lgm_better_from"])
    lines = [f"Errors against {reference}: LGM / decode, then the RGB model.", ""]
    lines += ["| noise | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for i, level in enumerate(noise["levels"]):
        pairs = [f"{number_cell(noise['lgm'][n][i])} / {number_cell(noise['decode_then_rgb'][n][i])}" for n in names]
        lines += [f"| {level:g} | " + " | ".join(pairs) + " |"]
    better = [number_cell(noise["lgm_better_from"][name]) for name in names]
    return [*lines, "| LGM better from | " + " | ".join(better) + " |", ""]


def quick_note(result: Mapping[str, Any]) -> list[str]:
    """What a page of the smallest sizes has to say of itself."""
    if not result["settings"]["quick"]:
        return []
    return ["**A quick run: it shows that the recipe works, and nothing else.**", ""]


def footer(result: Mapping[str, Any]) -> list[str]:
    """Sizes and machine, and what it was made of."""
    settings, where = result["settings"], result["machine"]
    made_of = ", ".join(f"{name} {digest}" for name, digest in result.get("made_of", {}).items())
    return [
        f"Recipe `{settings['config']}`, {settings['seeds']} training seeds, at most {settings['prompts']} prompts a "
        f"set, {settings['videos']} videos a prompt and model, {settings['steps']} steps, classifier-free guidance "
        f"{settings['guidance_scale']:g}. An improvement counts only if sample ({FEWEST_PROMPTS} prompts x "
        f"{FEWEST_SEEDS} videos), headline, motion, adherence and quality hold together, the headline's sign and "
        f'quality in every training seed (`checks` in the JSON); "{TOO_FEW}": all but the sample does.',
        "",
        f"Made on {where['gpu'] or where['platform']}, {where['processors']} processors, torch {where['torch']}, "
        f"vggrpo {where['vggrpo']}" + (f", of (SHA-256): {made_of}." if made_of else "."),
    ]


def _head(name: str, rows: Mapping[str, Any]) -> str:
    found = next(row["metrics"][name] for row in rows.values() if name in row["metrics"])
    return f"{name} ({'higher' if found['higher_is_better'] else 'lower'} is better)"


def number_cell(value: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def difference_cell(name: str, entry: Mapping[str, Any] | None) -> str:
    """A difference with its interval, marked where it is clearly better or worse (`MARKS`)."""
    if entry is None or entry["diff"] is None:
        return "-"
    mark = ""
    if _is_clear(name, entry):
        mark = " ▲" if (entry["diff"] > 0) == entry["higher_is_better"] else " ▼"
    return _interval_cell(entry) + mark


def _is_clear(name: str, entry: Mapping[str, Any]) -> bool:
    """By its interval for a headline metric; by the adjusted p for the others, of which there are many."""
    if entry["n"] < FEWEST_MARKED or entry["ci_low"] is None or entry["ci_high"] is None:
        return False
    if name in HEADLINE:
        return bool(entry["ci_low"] > 0 or entry["ci_high"] < 0)
    return entry.get("p_holm") is not None and entry["p_holm"] < ALPHA


def _interval_cell(entry: Mapping[str, Any]) -> str:
    if entry["ci_low"] is None or entry["ci_high"] is None:
        return f"{entry['diff']:+.3g}"
    return f"{entry['diff']:+.3g} [{entry['ci_low']:+.3g}, {entry['ci_high']:+.3g}]"


def _matched_cell(entry: Mapping[str, Any] | None) -> str:
    return "-" if entry is None or entry["diff"] is None else f"{_interval_cell(entry)}, n={entry['n']}"


def _seeds_cell(differences: Sequence[float | None]) -> str:
    """A difference a training seed; a dash where there is but one, which is the difference itself."""
    if len(differences) < 2:
        return "-"
    return ", ".join("-" if value is None else f"{value:+.3g}" for value in differences)


def forest(result: Mapping[str, Any]) -> np.ndarray:
    """A forest plot (H, W, 3) uint8 BGR: for each set and headline metric a panel, for each arm a bar; right is better.

    Green: better beyond its interval, red: worse, grey: no clear change.
    """
    panels = [(prompt_set, metric) for prompt_set in result["sets"] for metric in HEADLINE]
    arms = list(result["arms"])
    width, row, left = 420, 26, 190
    height = 50 + row * len(arms)
    canvas = np.full((height * len(result["sets"]) + 10, left + width * len(HEADLINE), 3), 255, np.uint8)
    for place, (prompt_set, metric) in enumerate(panels):
        y, x = height * (place // len(HEADLINE)), left + width * (place % len(HEADLINE))
        entries = {arm: result["sets"][prompt_set].get(arm, {}).get("metrics", {}).get(metric) for arm in arms}
        short = prompt_set if prompt_set.count(" + ") < 2 else "all prompts"  # more names do not fit over a panel
        _panel(canvas, x, y, width, row, f"{short}: {metric}", entries)
    return canvas


def _panel(canvas: np.ndarray, x: int, y: int, width: int, row: int, title: str, entries: Mapping[str, Any]) -> None:
    known = {arm: _towards_better(entry) for arm, entry in entries.items() if entry and entry["diff"] is not None}
    extent = max([abs(v) for triple in known.values() for v in triple] + [1e-12])
    middle = x + width // 2

    def at(value: float) -> int:
        return int(middle + value / extent * (width / 2 - 20))

    _text(canvas, f"{title} (+-{extent:.2g}, right is better)", x + 10, y + 20)
    cv2.line(canvas, (middle, y + 32), (middle, y + 40 + row * len(entries)), _GREY, 1)
    for place, arm in enumerate(entries):
        line = y + 48 + row * place
        if x < 200:
            _text(canvas, arm, 8, line + 5)
        if arm not in known:
            continue
        low, mean, high = known[arm]
        colour = _GREEN if low > 0 else _RED if high < 0 else _GREY
        cv2.line(canvas, (at(low), line), (at(high), line), colour, 2, cv2.LINE_AA)
        cv2.circle(canvas, (at(mean), line), 5, colour, -1, cv2.LINE_AA)


def _towards_better(entry: Mapping[str, Any]) -> tuple[float, float, float]:
    """Low end, mean and high end, signed so that positive is better; without an interval all three are the mean's."""
    mean = entry["diff"]
    low, high = (mean if entry[end] is None else entry[end] for end in ("ci_low", "ci_high"))
    if entry["ci_low"] is None:
        low, high = -abs(mean), abs(mean)  # unknown: drawn across zero
    return (low, mean, high) if entry["higher_is_better"] else (-high, -mean, -low)


def _text(canvas: np.ndarray, text: str, x: int, y: int) -> None:
    cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.42, _BLACK, 1, cv2.LINE_AA)
