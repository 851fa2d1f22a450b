"""The map and the strongest cells side by side: where the effect sits, and how sure each of the top cells is."""

import textwrap
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from mech_align.plots._dots import dot_axis, draw_dots, label_room, open_dots_note
from mech_align.plots._facts import ALPHA, averaged, companions, dress, heading
from mech_align.plots._grid import Significance
from mech_align.plots._map import draw_map
from mech_align.plots.theme import show_text
from mech_align.results import Result


def overview(
    result: Result, k: int = 15, *, beside: Mapping[str, Result] | None = None, facet: str | None = None,
    significance: Significance = "fade", alpha: float = ALPHA, limit: float | None = None,
    tokens: Sequence[str] | None = None, title: str | None = None,
) -> go.Figure:  # fmt: skip
    """Draw the map of ``heatmap`` with the ranked list of its ``k`` strongest cells beside it.

    Args and errors as for ``heatmap``.
    """
    others = companions(result, beside)
    mean = averaged(result)
    table = mean.top(k)
    share, line = 0.66, 21
    figure = go.Figure()
    drawn = draw_map(
        figure, mean, beside=others, facet=facet, significance=significance, alpha=alpha, limit=limit, tokens=tokens,
        share=share, least=min(line * len(table), 300),
    )  # fmt: skip
    number = 1 + sum(1 for name in figure.to_dict()["layout"] if str(name).startswith("xaxis"))
    x, y = f"x{number}", f"y{number}"
    draw_dots(figure, table, xaxis=x, yaxis=y, alpha=alpha)
    bottom = max(0.0, 1 - max(line * len(table), 60) / drawn.height)
    figure.update_layout(
        {
            f"xaxis{number}": {
                "domain": [share + 0.05, 1], "anchor": y, "zeroline": True, "showline": True, "nticks": 5,
                "rangemode": "tozero",
                "title": {"text": "<br>".join(map(show_text, textwrap.wrap(f"effect, {mean.unit}", 42)))},
            },
            f"yaxis{number}": {"domain": [bottom, 1], "anchor": x, "side": "right", **dot_axis(table)},
        }
    )  # fmt: skip
    figure.add_annotation(
        text=f"{len(table)} strongest of {int(mean.data.count()):,}", x=share + 0.05, y=1, xref="paper", yref="paper",
        xanchor="left", yanchor="bottom", yshift=4, font={"size": 13},
    )  # fmt: skip
    return dress(
        figure, title=heading(mean, title), notes=[*drawn.notes, open_dots_note(table, alpha)], height=drawn.height,
        bottom=drawn.bottom, top=max(drawn.top, 24), left=drawn.left, right=label_room(table),
    )  # fmt: skip
