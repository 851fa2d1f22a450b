"""Maps of cells: panels, columns with a scale of their own, colour bars. Shared by ``heatmap`` and ``overview``."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mech_align.errors import MechAlignError
from mech_align.plots._facts import ALPHA, averaged, basis, companions, quantity
from mech_align.plots._grid import (
    Grid,
    Significance,
    below,
    draw_grid,
    grid_of,
    limits,
    row_height,
    style_axes,
    verdict,
)
from mech_align.plots.theme import Number, show_text
from mech_align.results import Result

_WIDTH = 900
"""Pixels that a figure is laid out for; it stretches with the page."""
_SPACE = 0.025
_MAX_FACETS = 16
_FACETS = ("part", "intervention", "cell", "token", "position", "head")


@dataclass(frozen=True)
class Drawn:
    """What a map needs around it."""

    mean: Result
    notes: list[str]
    height: Number
    top: Number
    bottom: Number
    left: Number


def draw_map(
    figure: go.Figure, result: Result, *, beside: Mapping[str, Result] | None = None, facet: str | None = None,
    significance: Significance = "fade", alpha: float = ALPHA, limit: float | None = None,
    tokens: Sequence[str] | None = None, share: Number = 1.0, least: Number = 0.0,
) -> Drawn:  # fmt: skip
    """Draw a whole map, panels and colour bars, into the left ``share`` of a figure, at least ``least`` pixels high."""
    mean = averaged(result)
    rows, columns, facet = _roles(mean, facet)
    names = list(tokens) if tokens is not None else None
    grids = _facets(mean, rows, columns, facet, names)
    # attention blocks and MLPs belong beside a map of heads, one row a layer
    others = companions(result, beside) if rows == "layer" else {}
    extra = [grid_of(_fitting(mean, other, label), rows, None, names, label) for label, other in others.items()]
    largest = limit if limit is not None else max(grid.largest for grid in grids)
    place = _Place(grids[0], len(grids), len(extra), facet is not None, share, least)
    for i, grid in enumerate(grids):
        _panel(figure, grid, place, i, "coloraxis", significance, alpha, facet is not None)
    for i, grid in enumerate(extra):
        _panel(figure, grid, place, len(grids) + i, "coloraxis2", significance, alpha, False)
    _colour_bars(figure, mean, extra, place, largest)
    bottom = place.bottom(len(quantity(mean, place.bar * _WIDTH)))
    remarks: list[str] = []
    if any(grid.n_missing for grid in (*grids, *extra)):
        remarks.append("hatched: not measured")
    if limit is not None and any(grid.largest > limit for grid in grids):
        remarks.append(f"colours end at ±{limit:g}, larger effects are clipped")
    notes = [basis(mean), " · ".join(filter(None, (verdict([*grids, *extra], alpha, significance), *remarks)))]
    return Drawn(mean, notes, place.height, 24 if facet is not None else 4, bottom, place.left)


@dataclass(frozen=True)
class _Place:
    """Where the panels go: facets in lines of at most four, columns of their own scale at the right."""

    first: Grid
    n_facets: int
    n_extra: int
    titled: bool
    share: Number = 1.0
    least: Number = 0.0

    @property
    def left(self) -> Number:
        longest = max(len(html.unescape(label)) for label in self.first.rows.labels)
        return max(64, 6.3 * longest + 40)

    @property
    def below(self) -> Number:
        """Pixels between a map and what comes under it."""
        return below(self.first, self.pixels(0)) + 16

    @property
    def bar(self) -> Number:
        """Length of the colour bar; it ends before that of the columns beside the map."""
        return min(0.62, self.split if self.n_extra else self.share, max(self.split, 0.5))

    def bottom(self, lines: int) -> Number:
        """Pixels under a map, its colour bar with a title of so many lines included."""
        return self.below + 42 + 15 * lines

    @property
    def n_columns(self) -> int:
        return len(self.first.columns.values)

    @property
    def across(self) -> int:
        most = 4 if self.n_columns <= 24 else 2
        return min(self.n_facets, most if self.share == 1 else max(1, most // 2))

    @property
    def down(self) -> int:
        return -(-self.n_facets // self.across)

    @property
    def panel_height(self) -> Number:
        n_rows = len(self.first.rows.values)
        return max(row_height(n_rows) * n_rows, 60, self.least if self.down == 1 else 0)

    @property
    def gap(self) -> Number:
        return self.below + 22 if self.titled else 0

    @property
    def height(self) -> Number:
        return self.down * self.panel_height + (self.down - 1) * self.gap

    @property
    def split(self) -> Number:
        """Where the columns of their own scale begin; narrow maps do not stretch over the whole page."""
        columns = self.n_extra * (self.column + 0.03) + 0.02 if self.n_extra else 0
        return min(self.share - columns, max(0.1, self.n_columns * self.across * 110 / _WIDTH))

    @property
    def column(self) -> Number:
        """Width of a column of its own scale."""
        return 0.075 if self.share == 1 else 0.065

    def across_domain(self, i: int) -> tuple[Number, Number]:
        if i >= self.n_facets:
            start = self.split + 0.045 + (i - self.n_facets) * (self.column + 0.02)
            return start, start + self.column
        width = (self.split - _SPACE * (self.across - 1)) / self.across
        start = i % self.across * (width + _SPACE)
        return start, start + width

    def down_domain(self, i: int) -> tuple[Number, Number]:
        line = 0 if i >= self.n_facets else i // self.across
        top = 1 - line * (self.panel_height + self.gap) / self.height
        return max(0.0, top - self.panel_height / self.height), top

    def pixels(self, i: int) -> Number:
        start, end = self.across_domain(i)
        return (end - start) * _WIDTH


def _panel(
    figure: go.Figure, grid: Grid, place: _Place, i: int, coloraxis: str, significance: Significance, alpha: float,
    titled: bool,
) -> None:  # fmt: skip
    suffix = "" if i == 0 else str(i + 1)
    xaxis, yaxis = f"x{suffix}", f"y{suffix}"
    x, y = place.across_domain(i), place.down_domain(i)
    own = coloraxis == "coloraxis2"
    width = place.pixels(i)
    draw_grid(
        figure, grid, xaxis=xaxis, yaxis=yaxis, coloraxis=coloraxis, width=width, height=place.panel_height,
        significance=significance, alpha=alpha,
    )  # fmt: skip
    style_axes(
        figure, grid, xaxis=xaxis, yaxis=yaxis, x=x, y=y, width=width, height=place.panel_height,
        row_labels=not own and i % place.across == 0,
    )  # fmt: skip
    if i:
        figure.update_layout({f"yaxis{suffix}": {"matches": "y"}})
    if titled:
        figure.add_annotation(
            text=show_text(grid.label), x=x[0], y=y[1], xref="paper", yref="paper", xanchor="left", yanchor="bottom",
            yshift=4, font={"size": 13},
        )  # fmt: skip


def _colour_bars(figure: go.Figure, result: Result, extra: list[Grid], place: _Place, largest: Number) -> None:
    bar: dict[str, Any] = {
        "orientation": "h", "thickness": 10, "xanchor": "left", "yanchor": "top", "y": -place.below / place.height,
        "xpad": 0, "ypad": 0,
    }  # fmt: skip
    own = {"text": "<br>".join(quantity(result, place.bar * _WIDTH)), "side": "top"}
    figure.update_layout(
        coloraxis={**limits(largest), "colorbar": {**bar, "x": 0, "len": place.bar, "title": own}},
    )
    if extra:
        start = place.across_domain(place.n_facets)[0]
        end = place.across_domain(place.n_facets + len(extra) - 1)[1]
        other = {"text": "same unit, own scale", "side": "top"}
        figure.update_layout(
            coloraxis2={
                **limits(max(grid.largest for grid in extra)),
                "colorbar": {**bar, "x": start, "len": end - start, "nticks": 3, "title": other},
            }
        )


def _roles(mean: Result, facet: str | None) -> tuple[str, str | None, str | None]:
    """Which axis goes down, which across, and which becomes panels."""
    dims = [str(dim) for dim in mean.data.dims]
    if facet is not None and facet not in dims:
        raise MechAlignError(f"no axis '{facet}' to lay out as panels", hint=f"axes: {', '.join(dims)}")
    if not dims or len(dims) > 3:
        raise MechAlignError(
            f"a heatmap has two axes, the result has {len(dims)}: {', '.join(dims)}",
            hint="pick one value of an axis first, e.g. result.select(part='mlp_out')",
        )
    if len(dims) == 3 and facet is None:
        facet = next((name for name in _FACETS if name in dims and mean.data.sizes[name] <= _MAX_FACETS // 2), None)
    if len(dims) == 3 and (facet is None or mean.data.sizes[facet] > _MAX_FACETS):
        sizes = ", ".join(f"{dim} ({mean.data.sizes[dim]})" for dim in dims)
        first = mean.values[dims[1]].values[0] if dims[1] in mean.values.coords else 0
        raise MechAlignError(
            f"a heatmap has two axes, the result has three: {sizes}",
            hint=(f"pick one value, e.g. result.select({dims[1]}={first!r})",
                  f"or lay an axis of at most {_MAX_FACETS} values out as panels: heatmap(result, facet={dims[-1]!r})"),
        )  # fmt: skip
    rest = [dim for dim in dims if dim != facet]
    if len(rest) == 1:
        return rest[0], None, facet
    rows = "layer" if "layer" in rest else next((d for d in rest if d not in ("position", "token")), rest[0])
    return rows, next(dim for dim in rest if dim != rows), facet


def _facets(mean: Result, rows: str, columns: str | None, facet: str | None, tokens: list[str] | None) -> list[Grid]:
    if facet is None:
        return [grid_of(mean, rows, columns, tokens, "effect" if columns is None else "")]
    values = mean.values[facet].values if facet in mean.values.coords else range(mean.data.sizes[facet])
    labels = [value if isinstance(value, str) else f"{facet} {value}" for value in np.asarray(values).tolist()]
    return [
        grid_of(mean.map(lambda data, i=i: data.isel({facet: i}, drop=True)), rows, columns, tokens, label)
        for i, label in enumerate(labels)
    ]


def _fitting(mean: Result, other: Result, label: str) -> Result:
    dims = list(map(str, other.data.dims))
    if dims != ["layer"] or other.data.sizes["layer"] != mean.data.sizes["layer"]:
        raise MechAlignError(
            f"'{label}' cannot stand beside the map: its axes are ({', '.join(dims)})",
            hint="columns beside a map have one value for each of its layers: axes (prompt, layer)",
        )
    return other
