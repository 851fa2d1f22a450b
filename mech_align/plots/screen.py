"""Can the quick screen be trusted? Attribution scores against exact effects, a sample of what it left out included."""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from mech_align.errors import MechAlignError
from mech_align.plots._facts import averaged, basis, dress, heading, statistic
from mech_align.plots.theme import BLUE, GREY, VERMILION, show_text
from mech_align.results import Result, site_label

_MOST_NAMES = 8


def screen(result: Result, *, title: str | None = None) -> go.Figure:
    """Draw the score of the screen against the exact effect of every confirmed cell.

    Args:
        result: Of ``attribution_patching``: the variable ``exact`` beside the effect, NaN where it was not measured.

    Raises:
        MechAlignError: Nothing was confirmed.
    """
    mean = averaged(result)
    exact = statistic(mean, "exact")
    if exact is None or not np.isfinite(exact).any():
        raise MechAlignError(f"'{result.name}' holds no exact effects", hint="confirm the top of the screen first")
    score = mean.data.values.astype(np.float32)
    measured = np.isfinite(exact) & np.isfinite(score)
    top = measured & _chosen_by_score(mean, score, measured)
    figure = go.Figure()
    ends = float(np.max(np.abs([score[measured], exact[measured]]))) * 1.08 or 1.0
    figure.add_shape(type="line", x0=-ends, y0=-ends, x1=ends, y1=ends, line={"dash": "dot", "width": 1, "color": GREY})
    labels = _labels(mean)
    for chosen, name, symbol, colour in (
        (top, "top of the screen", "circle", BLUE),
        (measured & ~top, "random sample of the rest", "diamond-open", VERMILION),
    ):
        if chosen.any():
            figure.add_trace(
                go.Scatter(
                    x=score[chosen], y=exact[chosen], mode="markers", name=f"{name} ({int(chosen.sum())})",
                    marker={"size": 9, "symbol": symbol, "color": colour}, text=labels[chosen].tolist(),
                    hovertemplate="<b>%{text}</b><br>score  %{x:+.4f}<br>exact  %{y:+.4f}<extra></extra>",
                )
            )  # fmt: skip
    _names(figure, score[measured], exact[measured], labels[measured], ends)
    unit = mean.unit.removeprefix("screen score (first-order), ")
    axis = {"zeroline": True, "showgrid": True, "showline": True}
    figure.update_layout(
        xaxis={**axis, "title": {"text": show_text(f"attribution score, {unit}")}},
        yaxis={**axis, "title": {"text": show_text(f"exact effect, {unit}")}},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.15, "yanchor": "top"},
    )
    note = "dotted: score = exact effect"
    return dress(
        figure, title=heading(mean, title), notes=[basis(mean), " · ".join(filter(None, (_miss(mean), note)))],
        height=420,
        bottom=96, left=72,
    )  # fmt: skip


def _chosen_by_score(mean: Result, score: Any, measured: Any) -> Any:
    """Which cells were measured because of their score, and not by the lot."""
    if "confirmed" in mean.values:
        confirmed = mean.values["confirmed"].transpose(*mean.data.dims).values
        if confirmed.dtype.kind in "UO":
            return confirmed.astype(str) == "top"
    # all that is stronger than the strongest cell left out
    unmeasured = np.abs(score[~measured & np.isfinite(score)])
    return np.abs(score) >= (unmeasured.max() if unmeasured.size else 0)


def _labels(mean: Result) -> np.ndarray[Any, Any]:
    rows = mean.values[["effect"]].to_dataframe(dim_order=[str(dim) for dim in mean.data.dims]).reset_index()
    labels = [show_text(site_label(row)) for row in rows.to_dict("records")]
    return np.array(labels, dtype=object).reshape(mean.data.shape)


def _names(figure: go.Figure, x: Any, y: Any, labels: Any, ends: float) -> None:
    """Names of the strongest cells, leaving out those that would be written over a stronger one's."""
    placed: list[tuple[float, float]] = []
    for i in np.argsort(-np.abs(y), kind="stable")[:_MOST_NAMES]:
        if all(abs(x[i] - a) > ends / 8 or abs(y[i] - b) > ends / 12 for a, b in placed):
            placed.append((float(x[i]), float(y[i])))
            left = x[i] > ends * 0.6
            figure.add_annotation(
                text=labels[i], x=float(x[i]), y=float(y[i]), xanchor="right" if left else "left",
                xshift=-9 if left else 9,
                yanchor="middle", showarrow=False,
            )  # fmt: skip


def _miss(mean: Result) -> str:
    """The estimated miss rate, as far as provenance tells it."""
    told = mean.provenance.get("screen")
    if not isinstance(told, dict) or told.get("miss_rate") is None:  # pyright: ignore[reportUnknownMemberType]
        return ""
    record: dict[str, Any] = {str(key): value for key, value in told.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    words = f"estimated miss rate {100 * float(record['miss_rate']):.3g}%"
    ends = next((record[key] for key in ("miss_rate_interval", "miss_interval", "interval") if record.get(key)), None)
    return words if ends is None else f"{words} [{100 * float(ends[0]):.3g}, {100 * float(ends[1]):.3g}]"
