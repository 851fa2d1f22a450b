"""What every component writes towards the answer: heads as dots, layers as sums, and whether the parts add up."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from mech_align.errors import MechAlignError
from mech_align.plots._dots import hover, interval
from mech_align.plots._facts import Table, averaged, basis, dress, heading
from mech_align.plots.theme import BLUE, GREY, MARKERS, PURPLE, VERMILION, show_text
from mech_align.results import PROMPT, STATISTICS, Result

_OUTLIER = 3.5
"""Robust z (distance from the median in units of 1.4826 times the median deviation) beyond which a head is named."""
_MOST_NAMES = 12
_SERIES = (
    ("head", "heads, summed", BLUE),
    ("mlp", "MLP", VERMILION),
    ("bias", "biases", PURPLE),
    ("embed", "embeddings", GREY),
)


def contributions(result: Result, *, outlier: float = _OUTLIER, title: str | None = None) -> go.Figure:
    """Draw a direct logit attribution: one dot a head, and below it the sums of each layer on their own scale.

    Args:
        result: Axes ``(prompt, component)`` with the coordinates ``layer`` and ``kind`` of each component (``head``,
            ``mlp``, ``bias``, ``embed``, ``residual``).
        outlier: Heads beyond this robust z are named, at most twelve.

    Raises:
        MechAlignError: The result is not a list of components.
    """
    if "component" not in result.data.dims or not {"layer", "kind"} <= set(map(str, result.values.coords)):
        dims = ", ".join(map(str, result.data.dims))
        raise MechAlignError(
            f"'{result.name}' is not a list of components: its axes are ({dims})", hint="use heatmap(result)"
        )
    mean = averaged(result)
    table: Table = mean.frame()
    table["kind"], table["layer"] = table["kind"].astype(str), _layers(table)
    sums: Table = _by_layer(result)
    depth = int(table["layer"].max())
    figure = go.Figure()
    _heads(figure, table[table["kind"] == "head"], outlier)
    for i, (kind, name, colour) in enumerate(_SERIES):
        part = sums[sums["kind"] == kind]
        if len(part):
            _sums(figure, part, name, colour, i)
    first = -1 if bool((table["layer"] < 0).any()) else 0
    last = int(table.loc[table["kind"].isin(["head", "mlp"]), "layer"].max())
    at = [layer for layer in range(first, depth + 1) if layer < 0 or layer > last or depth < 36 or layer % 4 == 0]
    names = ["embed" if layer < 0 else "final" if layer > last else str(layer) for layer in at]
    ticks = {"tickmode": "array", "tickvals": at, "ticktext": names}
    shared = {"range": [first - 0.6, depth + 0.6], "showline": True, **ticks}
    value = {"zeroline": True, "showgrid": True}
    unit = show_text(result.unit)
    figure.update_layout(
        xaxis={**shared, "domain": [0, 1], "anchor": "y", "showticklabels": False},
        xaxis2={**shared, "domain": [0, 1], "anchor": "y2", "matches": "x", "title": {"text": "layer"}},
        yaxis={**value, "domain": [0.46, 1], "title": {"text": f"one head, {unit}"}},
        yaxis2={**value, "domain": [0, 0.4], "anchor": "x2", "title": {"text": f"sum of a layer, {unit}"}},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.13, "yanchor": "top"},
    )
    notes = [f"{basis(mean)}{' · ' + result.sign if result.sign else ''}", _completeness(result)]
    return dress(figure, title=heading(mean, title), notes=notes, height=500, bottom=96, left=72)


def _layers(table: Table) -> Any:
    """Layer numbers; what stands before the first block is -1, what comes after the last one stays beyond it."""
    layers: Any = pd.to_numeric(table["layer"], errors="coerce")
    layers = layers.where(table["kind"] != "embed", -1).astype(float)
    last = layers.max()
    return layers.fillna(last if np.isfinite(last) else 0).astype(int)


def _heads(figure: go.Figure, table: Table, outlier: float) -> None:
    effect = table["effect"].to_numpy(np.float32)
    if not len(effect):
        return
    middle = np.nanmedian(effect)
    spread = 1.4826 * np.nanmedian(np.abs(effect - middle))
    z = (effect - middle) / spread if spread > 0 else np.zeros_like(effect)
    named = np.zeros(len(effect), bool)
    order = np.argsort(-np.abs(np.nan_to_num(z)), kind="stable")[:_MOST_NAMES]
    named[order] = np.abs(np.nan_to_num(z[order])) > outlier
    place = table.groupby("layer").cumcount().to_numpy(float)
    count = table.groupby("layer")["layer"].transform("size").to_numpy(float)
    x = table["layer"].to_numpy(float) + (place / np.maximum(count - 1, 1) - 0.5) * 0.6
    names = [name for name in STATISTICS if name in table]
    labels = np.array([show_text(label) for label in table["component"]], dtype=object)
    for chosen, size, opacity in ((~named, 6, 0.55), (named, 9, 1.0)):
        rows = table[chosen]
        if not len(rows):
            continue
        figure.add_trace(
            go.Scatter(
                x=x[chosen].astype(np.float32), y=effect[chosen], mode="markers", opacity=opacity, showlegend=False,
                marker={"size": size, "color": BLUE},
                text=labels[chosen].tolist(), hovertemplate=hover(names, "y"),
                customdata=rows[names].to_numpy(np.float32) if names else None,
                error_y=interval(rows, effect[chosen]) if size == 9 else None,
            )
        )  # fmt: skip
    for position, value, label in _apart(x[named], effect[named], labels[named].tolist()):
        figure.add_annotation(
            text=label,
            x=position,
            y=value,
            xref="x",
            yref="y",
            xanchor="left",
            yanchor="middle",
            xshift=9,
            showarrow=False,
        )


def _apart(x: Any, y: Any, labels: list[str]) -> list[tuple[float, float, str]]:
    """Names of dots, leaving out those that would be written over a stronger one's."""
    height = float(np.ptp(y)) / 270 * 15 if len(y) else 0.0
    placed: list[tuple[float, float, str]] = []
    for i in np.argsort(-np.abs(y), kind="stable"):
        if all(abs(x[i] - other) > 1.2 or abs(y[i] - value) > height for other, value, _ in placed):
            placed.append((float(x[i]), float(y[i]), labels[i]))
    return placed


def _by_layer(result: Result) -> Table:
    """Sums over the components of a kind in a layer; with their interval where the prompts are still there."""
    kinds = result.values["kind"].values.astype(str)
    flat = pd.DataFrame({"layer": np.asarray(result.values["layer"].values, dtype=object), "kind": kinds})
    layers = _layers(flat).to_numpy()
    keys = sorted({(kind, int(layer)) for kind, layer in zip(kinds, layers, strict=True)})
    data = result.data.transpose(..., "component").values
    columns = [data[..., (kinds == kind) & (layers == layer)].sum(-1) for kind, layer in keys]
    summed = np.stack(columns, axis=-1)
    coords: dict[str, Any] = {
        "kind": ("cell", [kind for kind, _ in keys]),
        "layer": ("cell", [layer for _, layer in keys]),
    }
    if PROMPT in result.data.dims:
        coords |= {str(name): c for name, c in result.values.coords.items() if c.dims == (PROMPT,)}
        values = xr.Dataset({"effect": ((PROMPT, "cell"), summed)}, coords=coords)
    else:
        values = xr.Dataset({"effect": (("cell",), summed)}, coords=coords)
    return averaged(replace(result, values=values)).frame()


def _sums(figure: go.Figure, part: Table, name: str, colour: str, i: int) -> None:
    effect = part["effect"].to_numpy(np.float32)
    names = [key for key in STATISTICS if key in part]
    error = interval(part, effect)
    layers = part["layer"].to_numpy(int)
    figure.add_trace(
        go.Scatter(
            x=layers + (i - 1) * 0.14, y=effect, mode="markers", xaxis="x2", yaxis="y2", name=name,
            marker={"color": colour, "size": 8, "symbol": MARKERS[i]},
            error_y=None if error is None else {**error, "color": colour},
            text=[f"{name}, {'before layer 0' if layer < 0 else f'layer {layer}'}" for layer in layers],
            customdata=part[names].to_numpy(np.float32) if names else None, hovertemplate=hover(names, "y"),
        )
    )  # fmt: skip


def _completeness(result: Result) -> str:
    """Whether the parts sum to the metric, and the largest leftover of any prompt."""
    kinds = result.values["kind"].values.astype(str)
    data = result.data.transpose(..., "component").values.astype(float)
    total = data[..., kinds != "residual"].sum(-1)
    per_prompt = result.data.dims[:1]
    whole = next((result.values[n] for n in ("clean", "corrupt") if n in result.values), None)
    if "residual" in result.values and result.values["residual"].dims == per_prompt:
        left = result.values["residual"].values.astype(float)
    elif whole is not None and whole.dims == per_prompt:
        left = whole.values.astype(float) - total
    elif (kinds == "residual").any():
        left = data[..., kinds == "residual"].sum(-1)
    else:
        return f"sum of parts = {np.nanmean(total):+.4g}"
    told = f"sum of parts = {np.nanmean(total):+.4g}, metric = {np.nanmean(total + left):+.4g}"
    return f"{told}, largest leftover of a prompt {np.nanmax(np.abs(left)):.1e}"
