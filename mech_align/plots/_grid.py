"""One map of cells: colours, what survives correction, what was not measured. Shared by the pictures that hold maps."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from mech_align.plots._facts import ALPHA, Axis, averaged, axis_of, hover_numbers, survives, too_few_groups
from mech_align.plots.theme import Number, show_text, tint
from mech_align.results import Result, site_label

Significance = Literal["fade", "outline", "none"]

_LABELLED_CELLS = 20_000
"""Beyond this, hover text would outweigh the picture: the cell's indices are shown by the axes then."""
_TEXT_WIDTH = 44
_FADED = 0.38


@dataclass(frozen=True)
class Grid:
    """A result of two axes, ready to be drawn: rows from top to bottom."""

    result: Result
    rows: Axis
    columns: Axis
    label: str = ""

    @property
    def effect(self) -> np.ndarray[Any, Any]:
        return self.result.data.values.astype(np.float32)

    @property
    def largest(self) -> Number:
        values = np.abs(self.effect[np.isfinite(self.effect)])
        return float(values.max()) if values.size else 0.0

    @property
    def n_missing(self) -> int:
        return int(np.isnan(self.effect).sum())


def grid_of(result: Result, rows: str, columns: str | None, tokens: list[str] | None = None, label: str = "") -> Grid:
    """Bring a result into the shape of a map. ``columns`` None: a single column called ``label``."""
    mean = averaged(result)
    if columns is None:
        wide = mean.map(lambda values: values.expand_dims({"_": [label]}, axis=-1))
        names = [name for name in wide.values.data_vars if rows in wide.values[name].dims]
        wide = wide.map(lambda values: values[names].transpose(rows, "_"))
        return Grid(wide, axis_of(wide, rows, tokens), Axis("part", [label], [show_text(label)]), label)
    flat = mean.map(lambda values: values.transpose(rows, columns, ...))
    return Grid(flat, axis_of(flat, rows, tokens), axis_of(flat, columns, tokens), label)


def limits(largest: Number) -> dict[str, Any]:
    """A colour axis with 0 in its middle. Plotly ignores ``zmid`` beside limits, so both ends are set."""
    bound = largest if largest > 0 else 1.0
    return {"cmin": -bound, "cmax": bound, "autocolorscale": True}


def draw_grid(
    figure: go.Figure, grid: Grid, *, xaxis: str, yaxis: str, coloraxis: str, width: Number, height: Number,
    significance: Significance = "fade", alpha: float = ALPHA,
) -> None:  # fmt: skip
    """Add one map to a figure.

    Args:
        width, height: Of the whole map in pixels, as far as known: text is written only into cells that hold it.
    """
    kept = None if significance == "none" else survives(grid.result, alpha)
    effect, n_columns, n_rows = grid.effect, len(grid.columns.values), len(grid.rows.values)
    gap = 1 if min(width / n_columns, height / n_rows) >= 14 else 0
    common = {
        "x": list(range(n_columns)), "y": list(range(n_rows)), "xaxis": xaxis, "yaxis": yaxis, "coloraxis": coloraxis,
        "xgap": gap, "ygap": gap, "hoverongaps": False, **_hover(grid),
    }  # fmt: skip
    text: dict[str, Any] = {}
    if width / n_columns >= _TEXT_WIDTH and height / n_rows >= 18:
        text = {"texttemplate": "%{z:+.2f}", "textfont": {"size": 11}}
    if kept is None or significance == "outline":
        figure.add_trace(go.Heatmap(z=effect, **common, **text))
    else:
        blank = np.float32(np.nan)
        figure.add_trace(go.Heatmap(z=np.where(kept, blank, effect), opacity=_FADED, **common))
        figure.add_trace(go.Heatmap(z=np.where(kept, effect, blank), **common, **text))
    if kept is not None and kept.any() and width / n_columns >= 6:
        thin = {"line": {"width": 1}} if min(width / n_columns, height / n_rows) < 14 else {}
        figure.add_shape(type="path", path=_outlines(kept), xref=xaxis, yref=yaxis, **thin)
    _draw_missing(figure, grid, xaxis, yaxis)


def style_axes(
    figure: go.Figure, grid: Grid, *, xaxis: str, yaxis: str, x: tuple[Number, Number], y: tuple[Number, Number],
    width: Number,
    height: Number, row_labels: bool = True,
) -> None:  # fmt: skip
    """Domains, ticks and a frame for one map; rows count from the top."""
    size, slanted = label_width(grid, width)
    frame = {"showline": True, "mirror": True, "zeroline": False, "showgrid": False}
    figure.update_layout(
        {
            f"xaxis{xaxis[1:]}": {
                "domain": x, "anchor": yaxis, "range": [-0.5, len(grid.columns.values) - 0.5],
                "title": {"text": grid.columns.title}, "tickangle": -45 if slanted else 0, **frame,
                **grid.columns.ticks(max(1, int(width / (18 if slanted else max(size, 24))))),
            },
            f"yaxis{yaxis[1:]}": {
                "domain": y, "anchor": xaxis, "range": [len(grid.rows.values) - 0.5, -0.5],
                "title": {"text": grid.rows.title if row_labels else ""}, "showticklabels": row_labels, **frame,
                **({} if row_labels else {"ticks": ""}),
                **grid.rows.ticks(max(1, int(height / 17))),
            },
        }
    )  # fmt: skip


def label_width(grid: Grid, width: Number) -> tuple[Number, bool]:
    """Pixels that the longest label below a map needs, and whether the labels have to be slanted to fit."""
    size = 6.0 * max((len(html.unescape(label)) for label in grid.columns.labels), default=1) + 4
    return size, size > 30 and size * len(grid.columns.labels) > width


def below(grid: Grid, width: Number) -> Number:
    """Pixels that tick labels and the title of the axis take below a map."""
    size, slanted = label_width(grid, width)
    return (0.75 * size + 18 if slanted else 22) + (24 if grid.columns.title else 0)


def row_height(n_rows: int) -> Number:
    """Pixels of a row: few rows are tall, many are thin but never invisible."""
    return float(min(38, max(9 if n_rows <= 100 else 4, 420 / max(n_rows, 1))))


def verdict(grids: Sequence[Grid], alpha: float, significance: Significance) -> str:
    """One sentence: what survives the correction, and how the picture shows it."""
    if significance == "none":
        return ""
    tested = [(grid, kept) for grid in grids if (kept := survives(grid.result, alpha)) is not None]
    few = next((n for grid in grids if (n := too_few_groups(grid.result, alpha))), 0)
    if few and not tested:
        return f"{few} groups of prompts are too few for any cell to reach max-T p ≤ {alpha:g}: nothing is faded"
    if not tested:
        return ""
    n_cells = sum(int(np.isfinite(grid.effect).sum()) for grid, _ in tested)
    n_kept = sum(int(kept.sum()) for _, kept in tested)
    shown = "outlined, the others faded" if significance == "fade" else "outlined"
    rule = f"sign-flip max-T p ≤ {alpha:g}"
    if not n_kept:
        return f"none of {n_cells:,} cells survives {rule}" + (": all faded" if significance == "fade" else "")
    return f"{n_kept:,} of {n_cells:,} cells {'survives' if n_kept == 1 else 'survive'} {rule}: {shown}"


def _hover(grid: Grid) -> dict[str, Any]:
    customdata, lines = hover_numbers(grid.result)
    small = grid.effect.size <= _LABELLED_CELLS
    name = "<b>%{text}</b>" if small else f"<b>{grid.rows.title} %{{y}} · {grid.columns.title} %{{x}}</b>"
    hover: dict[str, Any] = {
        "hovertemplate": f"{name}<br>effect   %{{z:+.4f}}<br>{lines if small else ''}<extra></extra>"
    }
    if small:
        hover["text"] = cell_labels(grid)
        if customdata is not None:
            hover["customdata"] = customdata
    return hover


def cell_labels(grid: Grid) -> list[list[str]]:
    """A short escaped name for each cell, such as ``L10H7`` or ``L3 attention``."""
    labels: list[list[str]] = []
    for row, row_text in zip(grid.rows.values, grid.rows.labels, strict=True):
        line: list[str] = []
        for column, column_text in zip(grid.columns.values, grid.columns.labels, strict=True):
            where = {grid.rows.name: row, grid.columns.name: column}
            if {"layer", "head"} <= set(where) or {"layer", "neuron"} <= set(where):
                line.append(show_text(site_label(where)))
            else:
                pairs = ((grid.rows, row_text), (grid.columns, column_text))
                line.append(" · ".join(f"{axis.title} {text}".strip() for axis, text in pairs if text))
        labels.append(line)
    return [[f"{text} ({show_text(grid.label)})" for text in line] for line in labels] if _named(grid) else labels


def _named(grid: Grid) -> bool:
    return bool(grid.label) and grid.columns.labels != [show_text(grid.label)]


def _outlines(kept: np.ndarray[Any, Any]) -> str:
    """Edges between a cell that survives and one that does not, as one path: neighbours share no inner line."""
    framed = np.pad(kept, 1)
    path: list[str] = []
    for r, c in np.argwhere(framed[1:, 1:-1] != framed[:-1, 1:-1]):
        path.append(f"M{c - 0.5},{r - 0.5}L{c + 0.5},{r - 0.5}")
    for r, c in np.argwhere(framed[1:-1, 1:] != framed[1:-1, :-1]):
        path.append(f"M{c - 0.5},{r - 0.5}L{c - 0.5},{r + 0.5}")
    return "".join(path)


def _draw_missing(figure: go.Figure, grid: Grid, xaxis: str, yaxis: str) -> None:
    """Grey with a stroke through it, and a hover box that says so: a cell without a value is not a cell with 0."""
    where = np.argwhere(np.isnan(grid.effect))
    if not len(where):
        return
    blank = np.where(np.isnan(grid.effect), np.float32(0), np.float32(np.nan))
    colour = tint("#808790", 0.28)
    figure.add_trace(
        go.Heatmap(
            z=blank, x=list(range(blank.shape[1])), y=list(range(blank.shape[0])), xaxis=xaxis, yaxis=yaxis,
            colorscale=[[0, colour], [1, colour]], showscale=False, hoverongaps=False,
            text=cell_labels(grid) if blank.size <= _LABELLED_CELLS else None,
            hovertemplate="<b>%{text}</b><br>not measured<extra></extra>",
        )
    )  # fmt: skip
    if len(where) <= _LABELLED_CELLS:
        strokes = "".join(f"M{c - 0.5},{r + 0.5}L{c + 0.5},{r - 0.5}" for r, c in where)
        figure.add_shape(type="path", path=strokes, xref=xaxis, yref=yaxis, line={"width": 1, "color": "#808790"})
