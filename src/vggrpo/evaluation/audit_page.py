"""The reward audit as one page that opens from disk: where the reprojection error lies, and who agrees with whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vggrpo.io.atomic import atomic_write

Terms = Mapping[str, Tensor]  # name -> one value a clip
KINDS = {"smooth": "consistent clips", "wobble": "with wobble, 0 to 4 px", "generated": "the base generator's clips"}


def write_audit_page(
    path: Path,
    result: Mapping[str, Any],
    rendered: Mapping[str, Mapping[str, Terms]],
    generated: Mapping[str, Terms],
    groups: Sequence[int],
) -> Path:
    """Draw what `audit_reward` measured.

    Args:
        rendered: kind of clip -> who measures (lgm, judge, truth) -> terms.
        generated: who measures (lgm, judge) -> terms of the generator's clips.
        groups: prompt of each generated clip; dots of one prompt share a colour.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    measured = tuple(result["spearman_truth"])
    titles = ["e_geo by kind of clip, LGM", "e_geo by kind of clip, judge"]
    for term in measured:
        truth, judge = result["spearman_truth"][term], result["spearman_judge"][term]
        titles += [f"{term}: LGM against the truth ({truth:.2f})", f"{term}: LGM against the judge ({judge:.2f})"]
    figure = make_subplots(4, 2, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.08)
    for column, who in enumerate(("lgm", "judge"), 1):
        for kind, label in KINDS.items():
            values = generated[who] if kind == "generated" else rendered[kind][who]
            figure.add_trace(go.Box(y=values["e_geo"].tolist(), name=label, showlegend=False), 1, column)
    for row, term in enumerate(measured, 2):
        for kind in ("wobble",) if term == "e_geo" else ("smooth", "handheld"):
            x, y = rendered[kind]["truth"][term].tolist(), rendered[kind]["lgm"][term].tolist()
            figure.add_trace(go.Scatter(x=x, y=y, mode="markers", name=kind, showlegend=False), row, 1)
        figure.update_xaxes(title="truth", row=row, col=1)
        x, y = generated["judge"][term].tolist(), generated["lgm"][term].tolist()
        marker = {"color": [float(g) for g in groups[: len(x)]], "colorscale": "Turbo"}
        figure.add_trace(go.Scatter(x=x, y=y, mode="markers", marker=marker, showlegend=False), row, 2)
        figure.update_xaxes(title="judge", row=row, col=2)
    verdict = "passed" if result["passed"] else "<br>".join(["NOT passed:", *result["missed"]])
    ratio = f"floor on consistent clips / error on base clips = {result['ratio']:.2f}"
    title = f"Reward audit, {result['clips']} clips of each kind<br>{verdict}<br>{ratio}"
    figure.update_layout(title=title, height=1800, margin_t=190, template="plotly_white")  # as wide as the window
    figure.update_annotations(font_size=13)
    return atomic_write(path, figure.to_html(include_plotlyjs=True, full_html=True))
