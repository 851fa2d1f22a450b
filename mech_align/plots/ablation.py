"""Heads that were found beside heads drawn at random: does switching off the found ones do more than chance?"""

import numpy as np
import plotly.graph_objects as go

from mech_align.errors import MechAlignError
from mech_align.plots._dots import hover, interval
from mech_align.plots._facts import Table, averaged, basis, dress, heading, quantity
from mech_align.plots.theme import BLUE, GREEN, GREY, MARKERS, PURPLE, VERMILION, show_text, tint
from mech_align.results import STATISTICS, Result

_KINDS = {"found": ("found", BLUE), "joint": ("found, together", GREEN), "greedy": ("one after the other", PURPLE)}
_STRIP = 2.6
"""Height of the strip of controls, in lines."""


def ablation(result: Result, *, title: str | None = None) -> go.Figure:
    """Draw every ablated set with its interval, the random controls as a strip, their range as a band behind all.

    Args:
        result: Axes ``(prompt, cell)`` with the coordinate ``kind``: ``found``, ``joint``, ``greedy`` or ``control``.

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
    controls = table[table["kind"] == "control"]
    others = table[table["kind"] != "control"].reset_index(drop=True)
    figure = go.Figure()
    if len(controls):
        low, high = controls["effect"].min(), controls["effect"].max()
        figure.add_shape(
            type="rect", x0=low, x1=high, y0=0, y1=1, xref="x", yref="y domain", fillcolor=tint(GREY, 0.16),
            line={"width": 0},
            layer="below",
        )  # fmt: skip
    for kind in dict.fromkeys(others["kind"]):
        _sets(figure, others[others["kind"] == kind], kind, controls)
    middle = len(others) + (_STRIP - 1) / 2
    _strip(figure, controls, middle)
    labels = [show_text(label) for label in others["cell"]]
    lines = len(others) + (_STRIP if len(controls) else 0)
    at = [*range(len(others)), *([middle] if len(controls) else [])]
    longest = max([len(str(label)) for label in others["cell"]] + [16])
    figure.update_layout(
        xaxis={"title": {"text": "<br>".join(quantity(mean))}, "zeroline": True, "showline": True, "showgrid": True},
        yaxis={
            "tickmode": "array", "tickvals": at, "ticks": "", "range": [max(lines, 1) - 0.5, -0.5],
            "ticktext": [*labels, *([f"{len(controls)} random draws"] if len(controls) else [])],
        },
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -62 / (30 * max(lines, 3)), "yanchor": "top"},
    )  # fmt: skip
    return dress(
        figure, title=heading(mean, title), notes=[basis(mean), _chance(controls)], height=30 * max(lines, 3),
        bottom=100,
        left=min(320, 6.4 * longest + 24),
    )  # fmt: skip


def _sets(figure: go.Figure, table: Table, kind: str, controls: Table) -> None:
    name, colour = _KINDS.get(kind, (kind.replace("_", " "), VERMILION))
    effect = table["effect"].to_numpy(np.float32)
    error = interval(table, effect)
    names = [key for key in STATISTICS if key in table]
    beaten = [int((np.abs(controls["effect"]) < abs(value)).sum()) for value in effect]
    beside = [f"<br>larger than {n} of {len(controls)} random draws" if len(controls) else "" for n in beaten]
    text = [show_text(cell) + more for cell, more in zip(table["cell"], beside, strict=True)]
    figure.add_trace(
        go.Scatter(
            x=effect, y=table.index.tolist(), mode="markers", name=show_text(name),
            marker={"size": 10, "color": colour, "symbol": MARKERS[list(_KINDS).index(kind) if kind in _KINDS else 3]},
            error_x=None if error is None else {**error, "color": colour, "width": 5},
            text=text, customdata=table[names].to_numpy(np.float32) if names else None, hovertemplate=hover(names),
        )
    )  # fmt: skip


def _strip(figure: go.Figure, controls: Table, middle: float) -> None:
    if not len(controls):
        return
    names = [key for key in STATISTICS if key in controls]
    # spread by the golden ratio: even, and the same in every run
    spread = ((np.arange(len(controls)) * 0.6180339887) % 1 - 0.5) * (_STRIP - 1.2)
    figure.add_trace(
        go.Scatter(
            x=controls["effect"].to_numpy(np.float32), y=(middle + spread).astype(np.float32), mode="markers",
            name="random controls (grey band: their range)", marker={"size": 7, "color": GREY, "opacity": 0.8},
            text=[show_text(cell) for cell in controls["cell"]],
            customdata=controls[names].to_numpy(np.float32) if names else None, hovertemplate=hover(names),
        )
    )  # fmt: skip


def _chance(controls: Table) -> str:
    if not len(controls):
        return "no random controls: nothing says what any other heads would have done"
    effect = controls["effect"]
    return f"{len(controls)} random draws: mean {effect.mean():+.3f}, range [{effect.min():+.3f}, {effect.max():+.3f}]"
