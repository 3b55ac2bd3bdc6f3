"""The analysis of an LGM: tables in the terminal, `analysis.json`, and one page that opens from disk."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from vggrpo.evaluation.lgm_analysis import SHOWN
from vggrpo.io.atomic import atomic_write, atomic_write_json, ensure_directory, without_nan

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


Grid = tuple[str, list[str], list[list[str]]]  # title, header, rows


def tables(result: Mapping[str, Any]) -> list[Grid]:
    """What was measured, as the terminal and the page show it."""
    found: list[Grid] = []
    if "accuracy" in result:
        accuracy = result["accuracy"]
        who = [name for name in ("lgm", "rgb", "ratio", "lgm_against_rgb") if name in accuracy]
        names = [name for name in SHOWN if name in accuracy["lgm_against_rgb"]]
        header = ["error", *(name.replace("_", " ") for name in who)]
        rows = [[name, *(_number(accuracy[w].get(name)) for w in who)] for name in names]
        found.append((f"Accuracy on {accuracy['clips']} clips ({result['reference']})", header, rows))
    if "noise" in result:
        noise = result["noise"]
        names = [name for name in SHOWN if name in noise["lgm"]]
        lgm, decoded = noise["lgm"], noise["decode_then_rgb"]
        rows = [
            [f"{level:g}", *(f"{_number(lgm[n][i])} / {_number(decoded[n][i])}" for n in names)]
            for i, level in enumerate(noise["levels"])
        ]
        found.append(("Errors against latent noise: LGM / decode, then the RGB model", ["noise", *names], rows))
    for title, paths in result.get("cost", {}).items():
        header = ["path", "TFLOP", "of rgb", "seconds", "of rgb", "peak GiB"]
        rows = [[name, *_cost(row)] for name, row in paths.items()]
        found.append((f"Cost of one clip's geometry: {title}", header, rows))
    return found


def _cost(row: Mapping[str, Any]) -> list[str]:
    peak = row.get("peak_bytes")
    return [
        f"{row['flops'] / 1e12:.3g}", f"{row['flops_of_rgb']:.3f}", _number(row.get("seconds")),
        _number(row.get("time_of_rgb")), _number(None if peak is None else peak / 2**30),
    ]  # fmt: skip


def _print(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for title, header, rows in tables(result):
        table = Table(title=title)
        for column in header:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


STYLE = (
    "body{font-family:system-ui,sans-serif;max-width:1600px;margin:2rem auto;padding:0 1rem;color:#222}"
    "h1{font-size:1.3rem}h2{font-size:1rem;margin-top:2rem}table{border-collapse:collapse}"
    "td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #ddd}.wide{overflow-x:auto}"
)


def _draw(path: Path, result: Mapping[str, Any]) -> None:
    parts = [f"<h1>{escape(str(result['lgm']))} ({escape(result['reference'])})</h1>"]
    for title, header, rows in tables(result):
        lines = [[f"<th>{escape(cell)}</th>" for cell in header], *([f"<td>{escape(c)}</td>" for c in r] for r in rows)]
        body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
        parts.append(f'<h2>{escape(title)}</h2><div class="wide"><table>{body}</table></div>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    title = "<title>Analysis of a Latent Geometry Model</title>"
    atomic_write(path, f"<!doctype html>{head}{title}{''.join(parts)}{_figure(result)}")


def _figure(result: Mapping[str, Any]) -> str:
    """Errors against noise, and operations, where they were measured."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    noise, cost = result.get("noise"), result.get("cost", {})
    names = [name for name in SHOWN if noise and name in noise["lgm"]]
    titles = [f"{name} against latent noise" for name in names] + [f"TFLOP: {title}" for title in cost]
    if not titles:
        return ""
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
    figure.update_layout(height=420 * rows, template="plotly_white")
    return figure.to_html(include_plotlyjs=True, full_html=False)
