"""The analysis of an LGM: tables in the terminal, `analysis.json`, and one page that opens from disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vggrpo.evaluation.lgm_analysis import SHOWN
from vggrpo.io.atomic import atomic_write, atomic_write_json, ensure_directory

UNITS = {
    "abs_rel": "relative", "translation": "median depths", "rotation": "rad", "fov": "rad", "flow": "median depths",
}  # fmt: skip


def write_analysis(output: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write `analysis.json` and `analysis.html` and print the tables; returns what the JSON holds (NaN as null)."""
    kept = without_nan(result)
    atomic_write_json(ensure_directory(output) / "analysis.json", kept)
    _print(kept)
    _draw(output / "analysis.html", kept)
    return kept


def without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "accuracy" in result:
        accuracy = result["accuracy"]
        who = [name for name in ("lgm", "rgb", "ratio", "lgm_against_rgb") if name in accuracy]
        table = Table(title=f"Accuracy on {accuracy['clips']} clips ({result['reference']})")
        for column in ("error", *(name.replace("_", " ") for name in who)):
            table.add_column(column, justify="right")
        for name in SHOWN:
            if name in accuracy["lgm_against_rgb"]:
                table.add_row(name, *(_number(accuracy[w].get(name)) for w in who))
        console.print(table)
    if "noise" in result:
        noise = result["noise"]
        table = Table(title="Errors against latent noise: LGM / decode, then the RGB model")
        names = [name for name in SHOWN if name in noise["lgm"]]
        for column in ("noise", *names):
            table.add_column(column, justify="right")
        for i, level in enumerate(noise["levels"]):
            pairs = [f"{_number(noise['lgm'][n][i])} / {_number(noise['decode_then_rgb'][n][i])}" for n in names]
            table.add_row(f"{level:g}", *pairs)
        console.print(table)
    for title, rows in result.get("cost", {}).items():
        table = Table(title=f"Cost of one clip's geometry: {title}")
        for column in ("path", "TFLOP", "of rgb", "seconds", "of rgb", "peak GiB"):
            table.add_column(column, justify="right")
        for name, row in rows.items():
            peak = row.get("peak_bytes")
            table.add_row(
                name, f"{row['flops'] / 1e12:.3g}", f"{row['flops_of_rgb']:.3f}", _number(row.get("seconds")),
                _number(row.get("time_of_rgb")), _number(None if peak is None else peak / 2**30),
            )  # fmt: skip
        console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _draw(path: Path, result: Mapping[str, Any]) -> None:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    noise, cost = result.get("noise"), result.get("cost", {})
    names = [name for name in SHOWN if noise and name in noise["lgm"]]
    titles = [f"{name} against latent noise" for name in names] + [f"TFLOP: {title}" for title in cost]
    if not titles:
        titles = ["accuracy"]
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure = make_subplots(rows, columns, subplot_titles=titles)
    colours = {"lgm": "#0b6e4f", "decode_then_rgb": "#c1440e"}
    for i, name in enumerate(names):
        row, column = i // columns + 1, i % columns + 1
        for who, colour in colours.items():
            assert noise is not None
            line = go.Scatter(
                x=noise["levels"], y=noise[who][name], name=who.replace("_", " "), mode="lines+markers",
                line={"color": colour}, showlegend=i == 0,
            )  # fmt: skip
            figure.add_trace(line, row, column)
        figure.update_xaxes(title="noise, in units of a normalised latent", row=row, col=column)
        figure.update_yaxes(title=UNITS[name], rangemode="tozero", row=row, col=column)
    for i, table in enumerate(cost.values(), len(names)):
        bars = go.Bar(x=list(table), y=[r["flops"] / 1e12 for r in table.values()], showlegend=False)
        figure.add_trace(bars, i // columns + 1, i % columns + 1)
    if "accuracy" in result and not names and not cost:
        values = result["accuracy"]["lgm_against_rgb"]
        figure.add_trace(go.Bar(x=list(values), y=list(values.values())), 1, 1)
    figure.update_layout(
        title=f"{result['lgm']} ({result['reference']})", width=520 * columns, height=420 * rows,
        template="plotly_white",
    )  # fmt: skip
    atomic_write(path, figure.to_html(include_plotlyjs=True, full_html=True))
