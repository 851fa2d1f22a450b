"""How an effect changes from layer to layer."""

from itertools import product
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mech_align.errors import MechAlignError
from mech_align.plots._facts import averaged, axis_of, basis, dress, heading, quantity, statistic
from mech_align.plots.theme import COLOURS, DASHES, MARKERS, show_text, tint
from mech_align.results import Result

_MAX_LINES = 12


def lines(result: Result, *, along: str | None = None, title: str | None = None) -> go.Figure:
    """Draw curves with their intervals as bands, one curve for each value of the other axes.

    Args:
        along: The axis from left to right; by default ``layer``, else ``position``, else the last one.

    Raises:
        MechAlignError: More curves than can be told apart; says what to select.
    """
    mean = averaged(result)
    dims = [str(dim) for dim in mean.data.dims]
    if not dims:
        raise MechAlignError("the result is a single number: there is no curve to draw")
    along = along or next((dim for dim in ("layer", "position") if dim in dims), dims[-1])
    if along not in dims:
        raise MechAlignError(f"no axis '{along}'", hint=f"axes: {', '.join(dims)}")
    others = [dim for dim in dims if dim != along]
    count = int(np.prod([mean.data.sizes[dim] for dim in others]))
    if count > _MAX_LINES:
        sizes = ", ".join(f"{dim} ({mean.data.sizes[dim]})" for dim in others)
        raise MechAlignError(
            f"{count} curves cannot be told apart: {sizes}",
            hint=f"pick some first, e.g. result.select({others[0]}=[...]), or draw heatmap(result)",
        )
    figure = go.Figure()
    axis = axis_of(mean, along)
    for i, where in enumerate(product(*(range(mean.data.sizes[dim]) for dim in others))):
        one = mean.map(lambda values, w=where: values.isel(dict(zip(others, w, strict=True)), drop=True))
        labels = [axis_of(mean, dim).labels[j] for dim, j in zip(others, where, strict=True)]
        _curve(figure, one, axis.labels, " · ".join(labels), i, alone=count == 1)
    figure.update_layout(
        xaxis={
            "title": {"text": axis.title},
            "range": [-0.4, len(axis.labels) - 0.6],
            "showline": True,
            **axis.ticks(36),
        },
        yaxis={"title": {"text": "<br>".join(quantity(mean, 320))}, "zeroline": True, "showgrid": True},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.19, "yanchor": "top"},
        hovermode="x unified",
    )
    return dress(
        figure, title=heading(mean, title), notes=[basis(mean)], height=340,
        bottom=64 if count == 1 else 74 + 20 * -(-count // 3),
        left=72,
    )  # fmt: skip


def _curve(figure: go.Figure, one: Result, labels: list[str], name: str, i: int, *, alone: bool) -> None:
    colour = COLOURS[i % len(COLOURS)]
    x: list[int] = list(range(len(labels)))
    effect, low, high = (statistic(one, key) for key in ("effect", "ci_low", "ci_high"))
    assert effect is not None
    hover = "%{y:+.3f}"
    customdata: Any = None
    if low is not None and high is not None:
        customdata = np.stack([low, high], axis=-1)
        hover += " [%{customdata[0]:+.3f}, %{customdata[1]:+.3f}]"
        # one band for each unbroken stretch: a fill across a layer that was not measured would invent values
        for stretch in _stretches(np.isfinite(low) & np.isfinite(high)):
            figure.add_trace(
                go.Scatter(
                    x=[*stretch, *stretch[::-1]], y=np.concatenate([high[stretch], low[stretch][::-1]]), fill="toself",
                    fillcolor=tint(colour, 0.2), line={"width": 0}, mode="lines", hoverinfo="skip", showlegend=False,
                    legendgroup=str(i),
                )
            )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=x, y=effect, mode="lines+markers", name=name or show_text(one.name), legendgroup=str(i),
            showlegend=not alone,
            line={"color": colour, "dash": DASHES[i % len(DASHES)], "width": 2},
            marker={"symbol": MARKERS[i % len(MARKERS)], "size": 7, "color": colour},
            customdata=customdata, text=labels, hovertemplate=hover + ("<extra></extra>" if alone else ""),
        )
    )  # fmt: skip


def _stretches(there: np.ndarray[Any, Any]) -> list[list[int]]:
    found: list[list[int]] = []
    for i in np.flatnonzero(there).tolist():
        if found and found[-1][-1] == i - 1:
            found[-1].append(i)
        else:
            found.append([i])
    return found
