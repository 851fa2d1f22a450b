"""Which cells are strongest, and how sure that is."""

from typing import Literal

import plotly.graph_objects as go

from mech_align.plots._dots import dot_axis, draw_dots, label_room, open_dots_note
from mech_align.plots._facts import ALPHA, averaged, basis, dress, heading, quantity
from mech_align.results import Result


def ranked(
    result: Result, k: int = 20, *, by: Literal["abs", "positive", "negative"] = "abs", alpha: float = ALPHA,
    title: str | None = None,
) -> go.Figure:  # fmt: skip
    """Draw the ``k`` strongest cells with their intervals, strongest at the top.

    Args:
        by: By size whatever the sign, or the most positive, or the most negative ones.
        alpha: Cells whose max-T p is larger are drawn as open dots.
    """
    mean = averaged(result)
    table = mean.top(k, by=by)
    figure = go.Figure()
    draw_dots(figure, table, xaxis="x", yaxis="y", alpha=alpha)
    figure.update_layout(
        xaxis={
            "title": {"text": "<br>".join(quantity(mean))},
            "zeroline": True,
            "showline": True,
            "rangemode": "tozero",
        },
        yaxis=dot_axis(table),
    )
    notes = [basis(mean), open_dots_note(table, alpha)]
    default = (
        f"{mean.name.replace('_', ' ').capitalize()}: the {len(table)} strongest of {int(mean.data.count()):,} cells"
    )
    return dress(
        figure, title=heading(mean, title or default), notes=notes, height=max(90, 24 * len(table)), bottom=64,
        left=label_room(table),
    )  # fmt: skip
