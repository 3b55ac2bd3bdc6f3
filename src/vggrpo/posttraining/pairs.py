"""Preference pairs: for every prompt the base model's best and worst clips, by a measure that RGB frames (or latents)
give.

- `epipolar` (as Epipolar-DPO): Sampson error of matches under a robust fundamental matrix; the metric of evaluation.
- `geometry` (as VideoGPA): dense reprojection error by an RGB geometry model.
- `latent`: the configured rewards, read by the LGM.

In the first two a candidate that moves less than `dpo.min_motion` of its prompt's median is left out first: a still
clip has no error. A prompt whose candidates cannot be told apart, or measured, gives no pair, and its file says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.evaluation.evaluate import evaluate_clip
from vggrpo.evaluation.metrics import Clip
from vggrpo.io.atomic import atomic_write_json
from vggrpo.posttraining.algorithm import Context
from vggrpo.posttraining.clips import (
    base_candidates,
    clip_folder,
    clip_merit,
    prompt_file,
    read_prompt_files,
    save_latents,
)  # fmt: skip
from vggrpo.posttraining.rgb_reader import load_rgb_reader
from vggrpo.posttraining.scoring import GeometryReader
from vggrpo.rewards import geometry_reprojection_consistency


@dataclass(frozen=True)
class Pairs:
    """Stored pairs with their prompts; `refused` prompts gave none."""

    files: list[Path]
    prompts: list[str]
    refused: int

    def __len__(self) -> int:
        return len(self.files)

    def read(
        self, places: Sequence[int], device: torch.device
    ) -> tuple[Float[Tensor, "B C T H W"], Float[Tensor, "B C T H W"], list[str]]:
        """Winners, losers and prompts of some of them."""
        stored = [load_file(self.files[place]) for place in places]
        winner, loser = (torch.stack([pair[name] for pair in stored]).to(device) for name in ("winner", "loser"))
        return winner, loser, [self.prompts[place] for place in places]


def build_pairs(context: Context) -> Pairs:
    """Make the pairs that are missing, each process for its share of the prompts, and list all of them.

    Raises:
        UserError: when no prompt gives a pair.
    """
    settings, folder = context.config.dpo, clip_folder(context)
    reader: GeometryReader | None = None
    for number, prompt, latents in base_candidates(context, settings.candidates):
        if settings.pairs == "geometry" and reader is None:
            reader = load_rgb_reader(context.config.reward, context.model)
        errors, motion = measure_candidates(context, latents, prompt, reader)
        row: dict[str, Any] = {"prompt": prompt, "errors": _known(errors), "motion": _known(motion), "pairs": []}
        found = choose_pairs(errors, motion, settings.min_gap, settings.min_motion, settings.pairs_per_prompt,
                             relative=settings.pairs != "latent")  # fmt: skip
        if isinstance(found, str):
            row["refused"], found = found, []
        for place, (winner, loser) in enumerate(found):
            file = f"pair-{number:05d}-{place:02d}.safetensors"
            save_latents(folder / file, winner=latents[winner], loser=latents[loser])
            row["pairs"].append({"file": file, "winner": winner, "loser": loser})
        atomic_write_json(prompt_file(folder, number), row)
    context.processes.barrier()
    rows = read_prompt_files(folder)
    good = [(folder / pair["file"], row["prompt"]) for row in rows for pair in row["pairs"]]
    if not good:
        raise UserError(
            f"none of {len(rows)} prompts gives a pair ({rows[0]['refused'] if rows else 'no prompt'}); raise "
            "dpo.candidates, or lower dpo.min_gap or dpo.min_motion, and use another output=DIR"
        )
    refused = sum(not row["pairs"] for row in rows)
    return Pairs([file for file, _ in good], [prompt for _, prompt in good], refused)


@torch.no_grad()
def measure_candidates(
    context: Context, latents: Float[Tensor, "K C T H W"], prompt: str, reader: GeometryReader | None
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Error (lower is better) and amount of motion of each candidate, NaN where it cannot be measured."""
    settings = context.config.dpo
    if settings.pairs == "latent":
        merit, valid, _ = clip_merit(context, latents, [prompt] * len(latents))
        # The rewards bring their own guard against still clips (the hinge).
        return torch.where(valid, -merit, torch.nan), torch.ones_like(merit)
    if settings.pairs == "geometry":
        assert reader is not None
        size = context.config.lgm.micro_batch
        parts = [geometry_reprojection_consistency(reader(part)).terms for part in latents.split(size)]
        return tuple(torch.cat([part[name] for part in parts]).float().cpu() for name in ("e_geo", "travel"))  # type: ignore[return-value]
    errors, motion = [], []
    for latent in latents:
        video = context.model.decode(latent[None])[0]  # (3, T, H, W)
        frames = (video.permute(1, 2, 3, 0) * 255).round().to(torch.uint8).cpu().numpy()
        found = evaluate_clip(Clip(frames, settings.fps, prompt), ["epipolar_error", "motion_flow"])
        for values, name in ((errors, "epipolar_error"), (motion, "motion_flow")):
            value = found[name].value
            values.append(float("nan") if value is None else value)
    return torch.tensor(errors), torch.tensor(motion)


def choose_pairs(
    errors: Float[Tensor, " K"],
    motion: Float[Tensor, " K"],
    min_gap: float,
    min_motion: float,
    count: int = 1,
    *,
    relative: bool = True,
) -> list[tuple[int, int]] | str:
    """Places of the better and the worse candidate of at most `count` pairs, or why there is none.

    The best and the worst make a pair, the second best and the second worst, and so on: no clip is in two.

    Args:
        errors: lower is better, NaN = not measured.
        motion: amount of motion, NaN = not measured.
        min_gap: by which share of the worse error (not `relative`: by how much) the better one must be smaller.
        min_motion: candidates under this share of the median motion are left out.
        count: pairs at most.
        relative: see `min_gap`.
    """
    known = errors.isfinite() & motion.isfinite()
    if int(known.sum()) < 2:
        return f"{int(known.sum())} of {len(errors)} candidates could be measured"
    moving = known & (motion >= min_motion * motion[known].median())
    if int(moving.sum()) < 2:
        return f"{int(moving.sum())} of {len(errors)} candidates move enough"
    order = [k for k in errors.argsort(stable=True).tolist() if moving[k]]
    pairs = []
    for best, worst in list(zip(order, reversed(order), strict=True))[: min(count, len(order) // 2)]:
        gap = float(errors[worst] - errors[best])
        if gap <= 0 or gap < (min_gap * float(errors[worst]) if relative else min_gap):
            break  # the pairs that follow are closer still
        pairs.append((best, worst))
    return pairs or f"the candidates differ by {gap:.3g}, which is too little"


def _known(values: Float[Tensor, " K"]) -> list[float | None]:
    return [value if value == value else None for value in values.tolist()]
