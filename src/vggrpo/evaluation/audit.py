"""The reward audit: is what an LGM says about a clip signal or noise? Ask before training on it.

Three questions: how large is its reprojection error on clips that are perfectly consistent (the floor), against that of
the base generator's clips; do its terms follow shake and wobble of known size; does it agree with an independent judge
on generated clips?

The judge errs, too, so it looks at each generated clip and at its mirror image: its word is the mean of both, which
halves what is noise in it, and how far the two agree says what agreement anything can reach.

Beside the LGM stands the network that it was stitched from, on the frames that the VAE decodes: about what an LGM could
reach that learned all its teacher knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vggrpo import assets
from vggrpo.evaluation.audit_page import Terms, write_audit_page
from vggrpo.evaluation.statistics import spearman, within_group_spearman
from vggrpo.geometry import GeometryPrediction
from vggrpo.io.atomic import atomic_write_json, ensure_directory, without_nan
from vggrpo.lgm import LatentGeometryModel
from vggrpo.lgm.cache import teacher_views
from vggrpo.lgm.model import load_teacher
from vggrpo.models.base import GeometryModel
from vggrpo.models.loading import load_geometry_model, load_video_model
from vggrpo.models.wan import WanVideoModel
from vggrpo.rewards.registry import AUDITED, get_reward
from vggrpo.sampling import ode_sample
from vggrpo.world import sample_batch, sample_prompts
from vggrpo.world.perturb import wobble

TERMS = ("e_trans", "e_rot", "e_geo")
AUDIT_SEED = 20_000_000  # rendered clips that nothing was trained on
GROUP = 4
STEPS = 10
# The bars: floor / base, Spearman with the truth, Spearman with the judge within a group.
MAX_FLOOR, MIN_TRUTH, MIN_JUDGE = 0.5, 0.5, 0.4


def audit_reward(
    lgm: str | Path,
    output: str | Path,
    *,
    clips: int = 96,
    seed: int = 0,
    batch: int = 8,
    models: Path | None = None,
    video_model: str | Path | None = None,
    judge: str | Path | None = None,
    num_frames: int = 17,
    size: tuple[int, int] = (64, 64),
    prompts: Sequence[str] | None = None,
    steps: int = STEPS,
    guidance_scale: float = 1.0,
    dtype: str = "float32",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Audit an LGM; prints a table, writes `audit.json` (which it returns) and `audit.html`.

    The clips of known truth are rendered by the embedded world at the size that is asked for, whatever the video model.
    Training looks for `audit.json` in the LGM's own directory; with that as `output` the LGM carries its audit along.

    Args:
        lgm: directory, or "embedded".
        clips: rendered clips of each kind, and generated clips (in groups of four per prompt).
        seed: offset of all seeds.
        models: directory with `judge` and `pipeline`; default: the shipped ones.
        video_model: pipeline whose VAE the LGM reads and whose clips are judged, instead of `models`'.
        judge: geometry model that had no part in the LGM's training, instead of `models`'.
        num_frames, size: RGB frames and (height, width) of all clips.
        prompts: of the generated clips; they repeat with new seeds if there are fewer than clips / 4. None: captions of
            the embedded world.
        steps, guidance_scale: of the generated clips; best those with which training samples.
        dtype: of the video model's transformer and text encoder.
        options: keyword arguments of the two rewards by their names, as training will use them (`audited_options`).
        device: where clips are rendered and networks run.
    """
    ensure_directory(output)  # fail before any work
    model = LatentGeometryModel.from_pretrained(lgm)
    judge_path, pipeline = (assets.path(n) if models is None else models / n for n in ("judge", "pipeline"))
    generator = load_video_model(video_model or pipeline, device=str(device), dtype=dtype)
    model.check_latents_of(generator.latent_spec, generator)
    independent = load_geometry_model(judge or judge_path).to(device)  # type: ignore[attr-defined]
    teacher = load_teacher(lgm).to(device)  # type: ignore[attr-defined]
    subject = _Subject(model.to(device), teacher, independent, generator, num_frames, size, options or {})
    rendered = _rendered_terms(subject, clips, seed, batch)
    count = max(1, clips // GROUP)
    asked = list(islice(cycle(prompts or sample_prompts(count, seed + 1, split="heldout")), count))
    generated = _generated_terms(subject, asked, seed, batch, steps, guidance_scale)
    groups = [i // GROUP for i in range(len(generated["lgm"]["e_geo"]))]
    result = _findings(rendered, generated, groups) | {
        "clips": clips, "seed": seed, "steps": steps, "guidance_scale": guidance_scale,
        "options": {k: dict(v) for k, v in subject.options.items()},
    }  # fmt: skip
    write_audit_page(Path(output) / "audit.html", result, rendered, generated, groups)
    _print(result)
    result = without_nan(result)  # an untrained LGM may have no valid clip at all
    atomic_write_json(Path(output) / "audit.json", result)
    return result


def _findings(
    rendered: Mapping[str, Mapping[str, Terms]], generated: Mapping[str, Terms], groups: list[int]
) -> dict[str, Any]:
    """What an audit finds, for the LGM and its teacher, and the bars that the LGM misses."""
    answers = _answers("lgm", rendered, generated, groups)
    missed = missed_bars(answers)
    once, mirrored = generated["judge_once"], generated["judge_mirrored"]
    return answers | {
        "teacher": _answers("teacher", rendered, generated, groups),
        # Both read once, as they are.
        "floor_judge": _mean(rendered["smooth"]["judge"]["e_geo"]),
        "base_value_judge": _mean(once["e_geo"]),
        "judge_with_itself": {t: _correlation(once[t], mirrored[t], groups) for t in TERMS},
        "samples_needed": {t: samples_needed(generated["lgm"][t]) for t in TERMS},
        "passed": not missed,
        "missed": missed,
    }


def missed_bars(answers: Mapping[str, Any]) -> list[str]:
    """The bars that are not met, in words; what could not be measured (NaN) meets none."""
    missed = []
    # Where the base does not err at all, a floor of 0 says nothing.
    if not (answers["base_value"] > 0 and answers["floor"] <= MAX_FLOOR * answers["base_value"]):
        missed.append(
            f"floor {answers['floor']:.4f} on a base error of {answers['base_value']:.4f} (at most {MAX_FLOOR})"
        )
    for whom, bar in (("truth", MIN_TRUTH), ("judge", MIN_JUDGE)):
        low = [f"{term} {value:.2f}" for term, value in answers[f"spearman_{whom}"].items() if not value >= bar]
        if low:
            missed.append(f"Spearman with the {whom}: {', '.join(low)} (at least {bar})")
    return missed


def _answers(
    who: str,
    rendered: Mapping[str, Mapping[str, Terms]],
    generated: Mapping[str, Terms],
    groups: list[int],
) -> dict[str, Any]:
    """The three questions, put to `who`."""
    floor, base = _mean(rendered["smooth"][who]["e_geo"]), _mean(generated[who]["e_geo"])
    truth = {}
    for term in TERMS:
        kinds = ("wobble",) if term == "e_geo" else ("smooth", "handheld")
        seen, true = (torch.cat([rendered[kind][side][term] for kind in kinds]) for side in (who, "truth"))
        truth[term] = _correlation(seen, true)
    return {
        "floor": floor,
        "base_value": base,
        "ratio": floor / base if base else math.nan,
        "spearman_truth": truth,
        "spearman_judge": {t: _correlation(generated[who][t], generated["judge"][t], groups) for t in TERMS},
    }


@dataclass(frozen=True)
class _Subject:
    """What is audited, with which clips."""

    lgm: LatentGeometryModel
    teacher: GeometryModel
    judge: GeometryModel
    video_model: WanVideoModel
    num_frames: int
    size: tuple[int, int]
    options: Mapping[str, Mapping[str, Any]]

    def terms(self, prediction: GeometryPrediction) -> dict[str, Tensor]:
        """`TERMS` of a geometry, with the options of the training to come."""
        rewards = (get_reward(name)(prediction, **self.options.get(name, {})) for name in AUDITED)
        return {k: v.cpu() for reward in rewards for k, v in reward.terms.items() if k in TERMS}

    @property
    def view_stride(self) -> int:
        """RGB frames between two views of the LGM."""
        return self.lgm.config.temporal_stride if self.lgm.config.view_rate == "latent" else 1

    def read_frames(self, network: GeometryModel, video: Float[Tensor, "B 3 T H W"]) -> dict[str, Tensor]:
        """What a network of RGB makes of the LGM's views."""
        return self.terms(network(teacher_views(video, network, self.view_stride).float() / 255))


def samples_needed(values: Float[Tensor, " N"], power: float = 0.8, level: float = 0.05) -> dict[str, int | None]:
    """Clips an arm that a difference of 5, 10, 20 % of the mean needs to be seen: two-sided z-test, equal variances.

    `n = 2 (z_level/2 + z_power)^2 (std / difference)^2`; None where there is no spread to go by.
    """
    normal = NormalDist()
    known = values[values.isfinite()].double()
    if len(known) < 3 or not known.std() > 0:
        return {f"{percent}%": None for percent in (5, 10, 20)}
    factor = 2 * (normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)) ** 2
    spread = (known.std() / known.mean()).item()
    return {f"{percent}%": math.ceil(factor * (100 * spread / percent) ** 2) for percent in (5, 10, 20)}


@torch.inference_mode()
def _rendered_terms(subject: _Subject, clips: int, seed: int, batch: int) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Terms of rendered clips by kind (smooth, handheld, wobble) and by who measures (lgm, teacher, judge, truth)."""
    rows: dict[str, dict[str, list[dict[str, Tensor]]]] = {}
    device = subject.video_model.device
    for low in range(0, clips, batch):
        seeds = range(AUDIT_SEED + seed + low, AUDIT_SEED + seed + min(low + batch, clips))
        shape: dict[str, Any] = {"num_frames": subject.num_frames, "size": subject.size, "device": device}
        smooth = sample_batch(seeds, shake="smooth", **shape)
        # From none to four pixels, so that a rank correlation has something to order.
        amplitude = 4 * torch.rand(len(seeds), generator=torch.Generator().manual_seed(seed + low))
        worlds = {
            "smooth": smooth,
            "handheld": sample_batch(seeds, shake="handheld", **shape),
            "wobble": wobble(smooth, amplitude, seed + low, period=subject.view_stride),
        }
        for kind, world in worlds.items():
            target = rows.setdefault(kind, {"lgm": [], "teacher": [], "judge": [], "truth": []})
            latents = subject.video_model.encode_video(world.video)
            target["lgm"].append(subject.terms(subject.lgm(latents)))
            target["teacher"].append(subject.read_frames(subject.teacher, subject.video_model.decode(latents)))
            target["judge"].append(subject.read_frames(subject.judge, world.video))
            target["truth"].append(subject.terms(world.geometry(subject.view_stride)))
    return {kind: {who: _joined(parts) for who, parts in by.items()} for kind, by in rows.items()}


@torch.inference_mode()
def _generated_terms(
    subject: _Subject, asked: Sequence[str], seed: int, batch: int, steps: int, guidance_scale: float
) -> dict[str, dict[str, Tensor]]:
    """Terms of the base generator's clips, `GROUP` a prompt in a row, by who measures. The judge: of clips, of their
    mirror images, and the mean of both, which counts."""
    prompts = [prompt for prompt in asked for _ in range(GROUP)]
    video_model = subject.video_model
    shape = video_model.latent_spec.latent_shape(subject.num_frames, *subject.size)
    guided: dict[str, Any] = {}
    if guidance_scale != 1:
        guided = {"guidance_scale": guidance_scale, "negative_text": video_model.encode_prompt([""])}
    rows: dict[str, list[dict[str, Tensor]]] = {"lgm": [], "teacher": [], "judge_once": [], "judge_mirrored": []}
    for low in range(0, len(prompts), batch):
        part = prompts[low : low + batch]
        seeds = list(range(seed + low, seed + low + len(part)))
        text = video_model.encode_prompt(part)
        latents = ode_sample(video_model, text, shape=shape, seeds=seeds, num_steps=steps, **guided)
        rows["lgm"].append(subject.terms(subject.lgm(latents)))
        video = video_model.decode(latents)
        rows["teacher"].append(subject.read_frames(subject.teacher, video))
        rows["judge_once"].append(subject.read_frames(subject.judge, video))
        rows["judge_mirrored"].append(subject.read_frames(subject.judge, video.flip(-1)))
    found = {who: _joined(parts) for who, parts in rows.items()}
    return found | {"judge": {t: (found["judge_once"][t] + found["judge_mirrored"][t]) / 2 for t in TERMS}}


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([p[name] for p in parts]) for name in TERMS}


def _mean(values: Tensor) -> float:
    return values.nanmean().item()


def _correlation(first: Tensor, second: Tensor, groups: list[int] | None = None) -> float:
    """Spearman over clips that both could judge; within groups when they are given."""
    ok = (first.isfinite() & second.isfinite()).nonzero().flatten().tolist()
    a, b = first[ok].numpy(), second[ok].numpy()
    return spearman(a, b) if groups is None else within_group_spearman(a, b, [groups[i] for i in ok])


def _print(result: dict[str, Any]) -> None:
    table = Table(title="Reward audit: " + ("passed" if result["passed"] else "NOT passed"))
    for column in ("question", "LGM", "its teacher, on decoded frames", "bar"):
        table.add_column(column)
    both = result, result["teacher"]
    floors = [f"{who['floor']:.4f} / {who['base_value']:.4f} = {who['ratio']:.2f}" for who in both]
    table.add_row("e_geo on consistent clips / on base clips", *floors, f"<= {MAX_FLOOR}")
    questions = (("the truth", "spearman_truth", MIN_TRUTH), ("the judge in a group", "spearman_judge", MIN_JUDGE))
    for whom, key, bar in questions:
        for term in TERMS:
            table.add_row(f"Spearman with {whom}, {term}", *(f"{who[key][term]:.2f}" for who in both), f">= {bar}")
    itself = ", ".join(f"{term} {value:.2f}" for term, value in result["judge_with_itself"].items())
    table.add_row("for comparison: the judge with itself, on mirrored clips", itself, "", "")
    for term, sizes in result["samples_needed"].items():
        needed = ", ".join(f"{size}: {count}" for size, count in sizes.items())
        table.add_row(f"clips an arm to see {term} fall by", needed, "", "")
    Console().print(table)
    for bar in result["missed"]:
        Console().print(f"missed: {bar}")
