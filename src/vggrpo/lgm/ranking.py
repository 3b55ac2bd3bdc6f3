"""Which layer to stitch at: the closed-form connectors of a search, judged by the geometry that comes out of them.

A layer whose tokens are easy to predict is not always the one that the heads forgive errors at, so each fit is put in
front of the rest of the network, and depth, cameras and flow are compared with the network's own on the RGB views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vggrpo.io.atomic import atomic_write, atomic_write_json
from vggrpo.lgm.losses import geometry_errors
from vggrpo.lgm.model import LatentGeometryModel
from vggrpo.lgm.search import Pair, StitchFit

ERRORS = ("abs_rel", "translation", "rotation", "fov", "flow")


@dataclass(frozen=True)
class RankedFit:
    """One layer of the search.

    Attributes:
        errors: of the stitched network against the RGB network on held-out clips (`geometry_errors`), means.
        downstream: mean over depth, translation and rotation of the error, in units of the median layer's.
    """

    fit: StitchFit
    errors: dict[str, float]
    downstream: float


@torch.no_grad()
def rank_downstream(
    fits: Sequence[StitchFit],
    build: Callable[[StitchFit], LatentGeometryModel],
    heldout: Callable[[], Iterable[Pair]],
    by: str = "downstream",
) -> list[RankedFit]:
    """Best first.

    Args:
        build: the network with the connector of a fit, without LoRA.
        heldout: latents (B, C, T', H', W') and views (B, S, 3, h, w) in [0, 1], from the beginning at each call.
        by: "downstream" or "r2".
    """
    rows: list[dict[str, float]] = []
    for fit in fits:
        model = build(fit)
        parts: dict[str, list[torch.Tensor]] = {}
        for latents, views in heldout():
            for name, value in geometry_errors(model(latents), model.geometry(views)).items():
                parts.setdefault(name, []).append(value)
        rows.append({name: torch.cat(values).nanmean().item() for name, values in parts.items()})
    main = ERRORS[:3]
    middle = {name: max(sorted(row[name] for row in rows)[len(rows) // 2], 1e-12) for name in main}
    scores = [sum(row[name] / middle[name] for name in main) / len(main) for row in rows]
    ranked = [RankedFit(fit, row, score) for fit, row, score in zip(fits, rows, scores, strict=True)]
    return sorted(ranked, key=lambda r: r.downstream if by == "downstream" else -r.fit.r2)


def write_search(directory: Path, ranked: Sequence[RankedFit], chosen: int, by: str) -> None:
    """`search.json` and `search.html`, and a table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    rows: list[dict[str, Any]] = [
        {"layer": r.fit.layer, "r2": r.fit.r2, "downstream": r.downstream}
        | {name: (value if value == value else None) for name, value in r.errors.items()}
        for r in ranked
    ]
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
