"""Where in the network an effect sits: a map of cells."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from mech_align.plots._facts import ALPHA, dress, heading
from mech_align.plots._grid import Significance
from mech_align.plots._map import draw_map
from mech_align.results import Result


def heatmap(
    result: Result, *, beside: Mapping[str, Result] | None = None, facet: str | None = None,
    significance: Significance = "fade", alpha: float = ALPHA, limit: float | None = None,
    tokens: Sequence[str] | None = None, title: str | None = None,
) -> go.Figure:  # fmt: skip
    """Draw a result as a map, layer 0 at the top, blue positive, limits symmetric about 0.

    Prompts are averaged first where they were not. Cells that do not survive the correction for the whole map
    (``p_maxt <= alpha``) are faded, the others outlined; cells that were not measured are hatched. The hover box holds
    the value, its interval, p, q and n. Nothing is shown: the figure is returned.

    Args:
        result: One or two axes, or three when one of them can be laid out as panels.
        beside: Columns with a colour scale of their own, e.g. ``{"attention": ..., "MLP": ...}`` with the axes
            ``(prompt, layer)``; variables ``attn_out`` and ``mlp_out`` of the result are used without being asked for.
        facet: The axis to lay out as panels, where the result has three.
        significance: ``"fade"``, ``"outline"`` only, or ``"none"``.
        limit: End of the colour scale; by default the largest size in any panel.
        tokens: Labels for the axis ``position``.

    Raises:
        MechAlignError: More axes than can be drawn; says what to select.
    """
    figure = go.Figure()
    drawn = draw_map(
        figure, result, beside=beside, facet=facet, significance=significance, alpha=alpha, limit=limit, tokens=tokens
    )
    return dress(
        figure, title=heading(drawn.mean, title), notes=drawn.notes, height=drawn.height, bottom=drawn.bottom,
        top=drawn.top, left=drawn.left, right=28,
    )  # fmt: skip
