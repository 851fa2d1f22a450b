"""Dots with their intervals: cells from strong to weak, one a line."""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from mech_align.plots._facts import ALPHA, Table
from mech_align.plots.theme import BLUE, GREY, VERMILION, Number, show_text
from mech_align.results import STATISTICS


def draw_dots(figure: go.Figure, table: Table, *, xaxis: str, yaxis: str, alpha: float = ALPHA) -> None:
    """One dot a row of the table, the first at the top; open where it does not survive.

    The table has the columns ``site``, ``effect`` and whichever statistics there are.
    """
    if not len(table):
        return
    effect = table["effect"].to_numpy(np.float32)
    tested = "p_maxt" in table and bool(table["p_maxt"].notna().any())
    kept = (table["p_maxt"] <= alpha).to_numpy() if tested else np.ones(len(table), bool)
    colours = [BLUE if value >= 0 else VERMILION for value in effect]
    names = [name for name in STATISTICS if name in table]
    figure.add_trace(
        go.Scatter(
            x=effect, y=list(range(len(table))), mode="markers", xaxis=xaxis, yaxis=yaxis, showlegend=False,
            error_x=interval(table, effect),
            marker={
                "size": 9, "color": colours, "line": {"width": 1.5, "color": colours},
                "symbol": ["circle" if keep else "circle-open" for keep in kept],
            },
            text=[show_text(site) for site in table["site"]],
            customdata=table[names].to_numpy(np.float32) if names else None,
            hovertemplate=hover(names),
        )
    )  # fmt: skip


def dot_axis(table: Table, size: int | None = None) -> dict[str, Any]:
    """Tick settings of the axis that names the dots."""
    labels = [show_text(site) for site in table["site"]]
    return {
        "tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": labels, "showgrid": True,
        "range": [max(size or 0, len(labels), 1) - 0.5, -0.5], "ticks": "",
    }  # fmt: skip


def interval(table: Table, effect: Any) -> dict[str, Any] | None:
    """Asymmetric error bars, None without intervals."""
    if "ci_low" not in table or "ci_high" not in table:
        return None
    return {
        "type": "data", "symmetric": False, "thickness": 1.5, "width": 0, "color": GREY,
        "array": np.maximum(table["ci_high"].to_numpy(np.float32) - effect, 0),
        "arrayminus": np.maximum(effect - table["ci_low"].to_numpy(np.float32), 0),
    }  # fmt: skip


def hover(names: list[str], value: str = "x") -> str:
    """The hover box of a dot whose ``customdata`` holds these statistics."""
    at = {name: f"%{{customdata[{i}]" for i, name in enumerate(names)}
    lines = ["<b>%{text}</b>", f"effect   %{{{value}:+.4f}}"]
    if "ci_low" in at and "ci_high" in at:
        lines.append(f"interval [{at['ci_low']}:+.3f}}, {at['ci_high']}:+.3f}}]")
    labels = {"p": "p       ", "p_maxt": "p maxT  ", "q": "q (BH)  "}
    lines += [f"{label} {at[name]}:.2g}}" for name, label in labels.items() if name in at]
    if "n" in at:
        lines.append(f"prompts  {at['n']}:.0f}}")
    return "<br>".join(lines) + "<extra></extra>"


def label_room(table: Table) -> Number:
    """Pixels for the names of the dots."""
    return 6.6 * max((len(str(site)) for site in table["site"]), default=4) + 18


def open_dots_note(table: Table, alpha: float = ALPHA) -> str:
    """What an open dot means, where there is one."""
    if "p_maxt" in table and bool((table["p_maxt"] > alpha).any()):
        return f"open dots: do not survive sign-flip max-T p ≤ {alpha:g}"
    return ""
