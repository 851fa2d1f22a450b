"""Heads that were found beside heads drawn at random: does switching off the found ones do more than chance?"""

import html
from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from mech_align.errors import MechAlignError
from mech_align.plots._dots import hover, interval
from mech_align.plots._facts import Table, averaged, basis, dress, heading, quantity
from mech_align.plots.theme import BLUE, GREEN, GREY, MARKERS, PURPLE, VERMILION, Number, show_text, tint
from mech_align.results import STATISTICS, Result

_KINDS = {"found": ("found", BLUE), "joint": ("found, together", GREEN), "greedy": ("one after the other", PURPLE)}
_SINGLE = "control single"
_STRIP = 2.6
"""Height of the strip of controls, in lines."""


def ablation(result: Result, *, title: str | None = None) -> go.Figure:
    """Draw every ablated set with its interval, the random controls as strips, their range behind sets of their size.

    Args:
        result: Axes ``(prompt, cell)`` with the coordinate ``kind``: ``found``, ``joint``, ``greedy``, ``control`` (as
            large as the joint set) or ``control single``.

    Raises:
        MechAlignError: The result is not a list of ablated cells.
    """
    if "cell" not in result.data.dims or "kind" not in result.values.coords:
        dims = ", ".join(map(str, result.data.dims))
        raise MechAlignError(
            f"'{result.name}' is no list of ablated cells: its axes are ({dims})", hint="use heatmap(result)"
        )
    mean = averaged(result)
    table: Table = mean.frame()
    table["kind"] = table["kind"].astype(str)
    drawn = table["kind"].str.startswith("control")
    sets = table[~drawn].reset_index(drop=True)
    strips = {kind: table[table["kind"] == kind] for kind in dict.fromkeys(table.loc[drawn, "kind"])}
    figure = go.Figure()
    for kind in dict.fromkeys(sets["kind"]):
        _sets(figure, sets[sets["kind"] == kind], kind, _matched(kind, strips))
    at: list[Number] = list(range(len(sets)))
    labels, lines = [show_text(cell) for cell in sets["cell"]], float(len(sets))
    for i, (kind, controls) in enumerate(strips.items()):
        at.append(lines + (_STRIP - 1) / 2)
        labels.append(_strip_name(kind, controls, strips))
        _strip(figure, controls, at[-1], legend=i == 0)
        lines += _STRIP
    longest = max((len(html.unescape(label)) for label in labels), default=0)
    height = 30 * max(lines, 3)
    figure.update_layout(
        xaxis={"title": {"text": "<br>".join(quantity(mean))}, "zeroline": True, "showline": True, "showgrid": True},
        yaxis={
            "tickmode": "array", "tickvals": at, "ticktext": labels, "ticks": "",
            "range": [max(lines, 1) - 0.5, -0.5],
        },
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -62 / height, "yanchor": "top"},
    )  # fmt: skip
    return dress(
        figure, title=heading(mean, title), notes=[basis(mean), _chance(strips)], height=height, bottom=100,
        left=min(340, 6.4 * longest + 24),
    )  # fmt: skip


def _matched(kind: str, strips: Mapping[str, Table]) -> Table | None:
    """The controls of the same size: single heads for single heads, sets for sets; None where sizes differ."""
    if kind == "found":
        return strips.get(_SINGLE, strips.get("control"))
    return strips.get("control") if kind == "joint" else None


def _strip_name(kind: str, controls: Table, strips: Mapping[str, Table]) -> str:
    if len(strips) == 1:
        return f"{len(controls)} random draws"
    return f"{len(controls)} single heads" if kind == _SINGLE else f"{len(controls)} random sets"


def _sets(figure: go.Figure, table: Table, kind: str, controls: Table | None) -> None:
    name, colour = _KINDS.get(kind, (kind.replace("_", " "), VERMILION))
    effect = table["effect"].to_numpy(np.float32)
    error = interval(table, effect)
    names = [key for key in STATISTICS if key in table]
    text = [show_text(cell) for cell in table["cell"]]
    if controls is not None:
        beaten = [int((np.abs(controls["effect"]) < abs(value)).sum()) for value in effect]
        text = [f"{cell}<br>larger than {n} of {len(controls)} controls" for cell, n in zip(text, beaten, strict=True)]
        figure.add_shape(
            type="rect", x0=controls["effect"].min(), x1=controls["effect"].max(), y0=table.index[0] - 0.5,
            y1=table.index[-1] + 0.5, fillcolor=tint(GREY, 0.2), line={"width": 0}, layer="below",
        )  # fmt: skip
    symbol = MARKERS[list(_KINDS).index(kind) if kind in _KINDS else 3]
    figure.add_trace(
        go.Scatter(
            x=effect, y=table.index.tolist(), mode="markers", name=show_text(name),
            marker={"size": 10, "color": colour, "symbol": symbol},
            error_x=None if error is None else {**error, "color": colour, "width": 5},
            text=text, customdata=table[names].to_numpy(np.float32) if names else None, hovertemplate=hover(names),
        )
    )  # fmt: skip


def _strip(figure: go.Figure, controls: Table, middle: float, *, legend: bool) -> None:
    names = [key for key in STATISTICS if key in controls]
    # spread by the golden ratio: even, and the same in every run
    spread = ((np.arange(len(controls)) * 0.6180339887) % 1 - 0.5) * (_STRIP - 1.2)
    figure.add_trace(
        go.Scatter(
            x=controls["effect"].to_numpy(np.float32), y=(middle + spread).astype(np.float32), mode="markers",
            name="random controls (grey: range of those of the same size)", showlegend=legend,
            marker={"size": 7, "color": GREY, "opacity": 0.8}, text=[show_text(cell) for cell in controls["cell"]],
            customdata=controls[names].to_numpy(np.float32) if names else None, hovertemplate=hover(names),
        )
    )  # fmt: skip


def _chance(strips: Mapping[str, Table]) -> str:
    if not strips:
        return "no random controls: nothing says what any other heads would have done"
    words: list[str] = []
    for kind, controls in strips.items():
        effect = controls["effect"]
        ends = f"range [{effect.min():+.3f}, {effect.max():+.3f}]"
        words.append(f"{_strip_name(kind, controls, strips)}: mean {effect.mean():+.3f}, {ends}")
    return " · ".join(words)
