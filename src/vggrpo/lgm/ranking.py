"""Which layer to stitch at: the closed-form connectors of a search, judged by the geometry that comes out of them.

A layer whose tokens are easy to predict is not always the one that the heads forgive errors at, so each fit is put in
front of the rest of the network, and depth, cameras and flow are compared with the network's own on the RGB views.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vggrpo.errors import UserError
from vggrpo.geometry import GeometryPrediction
from vggrpo.io.atomic import atomic_write, atomic_write_json, without_nan
from vggrpo.lgm.losses import geometry_errors
from vggrpo.lgm.model import LatentGeometryModel
from vggrpo.lgm.search import StitchFit

ERRORS = ("abs_rel", "translation", "rotation", "fov", "flow")
_NEVER_MISSING = ERRORS[:3]


@dataclass(frozen=True)
class RankedFit:
    """One layer of the search.

    Attributes:
        errors: of the stitched network against the RGB network on held-out clips (`geometry_errors`), means.
        downstream: mean over depth, translation and rotation, and flow where something moves in the clips, of the
            error in units of the median layer's; NaN where one of them is no number for some clip.
    """

    fit: StitchFit
    errors: dict[str, float]
    downstream: float


@torch.no_grad()
def rank_downstream(
    fits: Sequence[StitchFit],
    build: Callable[[StitchFit], LatentGeometryModel],
    heldout: Iterable[tuple[Tensor, GeometryPrediction]],
    by: str = "downstream",
) -> list[RankedFit]:
    """Best first; a layer whose score is no number comes last.

    Args:
        build: the network with the connector of a fit, without LoRA; all are kept, so they should share their weights.
        heldout: latents (B, C, T', H', W') and the RGB network's geometry of the same clips; read once.
        by: "downstream" or "r2".

    Raises:
        UserError: no layer has a finite score.
    """
    models = [build(fit) for fit in fits]
    columns: list[dict[str, list[Tensor]]] = [{} for _ in fits]
    for latents, target in heldout:
        for model, parts in zip(models, columns, strict=True):
            for name, value in geometry_errors(model(latents), target).items():
                parts.setdefault(name, []).append(value)
    rows = [{name: _mean(name, torch.cat(values)) for name, values in parts.items()} for parts in columns]
    moving = any(math.isfinite(row.get("flow", math.nan)) for row in rows)
    decisive = (*_NEVER_MISSING, "flow") if moving else _NEVER_MISSING
    middle = {name: _middle([row[name] for row in rows]) for name in decisive}
    scores = [sum(row[name] / middle[name] for name in decisive) / len(decisive) for row in rows]
    costs = scores if by == "downstream" else [-fit.r2 for fit in fits]
    if not any(map(math.isfinite, costs)):
        raise UserError(
            "no layer of the search gives finite geometry on the held-out clips; raise stitch.ridge, give it more "
            "clips (clips.max_clips), or look at the latents"
        )
    ranked = [RankedFit(fit, row, score) for fit, row, score in zip(fits, rows, scores, strict=True)]
    order = sorted(range(len(fits)), key=lambda i: (not math.isfinite(costs[i]), costs[i]))
    return [ranked[i] for i in order]


def _mean(name: str, values: Tensor) -> float:
    """Over clips. NaN says of flow and masks that nothing moves, and is left out; of depth and cameras that the
    network failed, and stays."""
    return (values.mean() if name in _NEVER_MISSING else values.nanmean()).item()


def _middle(values: list[float]) -> float:
    """The median of the finite ones, which the errors are in units of; never zero."""
    finite = [value for value in values if math.isfinite(value)]
    return max(statistics.median_high(finite), 1e-12) if finite else 1.0


def write_search(directory: Path, ranked: Sequence[RankedFit], chosen: int, by: str) -> None:
    """`search.json` and `search.html`, and a table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    rows: list[dict[str, Any]] = [{"layer": r.fit.layer} | without_nan(_numbers(r)) for r in ranked]
    atomic_write_json(directory / "search.json", {"chosen": chosen, "ranked_by": by, "layers": rows})
    table = Table(title=f"Stitch points, best first by {by} (* chosen); errors against the RGB model, held-out clips")
    names = [name for name in ERRORS if name in rows[0]]
    for column in ("layer", "R^2", "downstream", *names):
        table.add_column(column, justify="right")
    for row in rows:
        mark = "*" if row["layer"] == chosen else ""
        numbers = ["-" if row[name] is None else f"{row[name]:.4f}" for name in ("r2", "downstream", *names)]
        table.add_row(f"{row['layer']}{mark}", *numbers)
    Console().print(table)
    _draw(directory / "search.html", rows, names, chosen)


def _numbers(ranked: RankedFit) -> dict[str, float]:
    return {"r2": ranked.fit.r2, "downstream": ranked.downstream} | ranked.errors


def _draw(path: Path, rows: list[dict], names: list[str], chosen: int) -> None:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows = sorted(rows, key=lambda row: row["layer"])
    panels = ["r2", *names]
    titles = ["held-out R^2 of the tokens", *(f"{name} against the RGB model" for name in names)]
    figure = make_subplots(1, len(panels), subplot_titles=titles)
    for column, name in enumerate(panels, 1):
        x, y = [row["layer"] for row in rows], [row[name] for row in rows]
        sizes = [14 if layer == chosen else 7 for layer in x]
        figure.add_trace(
            go.Scatter(x=x, y=y, mode="lines+markers", marker={"size": sizes}, showlegend=False), 1, column
        )
        figure.update_xaxes(title="layer", row=1, col=column)
    figure.update_layout(
        title=f"Where to stitch: closed-form connectors, before any training; layer {chosen} chosen (large marker)",
        width=330 * len(panels), height=420, template="plotly_white",
    )  # fmt: skip
    atomic_write(path, figure.to_html(include_plotlyjs=True, full_html=True))
