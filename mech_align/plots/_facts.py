"""What stands around every picture: averages, axis labels, units, and the line that says what the numbers rest on."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from mech_align.plots.theme import Number, show_text, show_token, template
from mech_align.results import PROMPT, STATISTICS, Result

ALPHA = 0.05
Table = Any
"""A pandas table. The types of pandas cannot tell a column from a table, so that they would only make noise here."""
BESIDE = {"attn_out": "attention", "mlp_out": "MLP"}
_TITLES = {"part": "", "cell": "", "component": "", "token": "position"}


@dataclass(frozen=True)
class Axis:
    """The labels along one side of a picture; ``values`` are the coordinates, drawn at 0, 1, 2, ..."""

    name: str
    values: list[Any]
    labels: list[str]

    @property
    def title(self) -> str:
        return _TITLES.get(self.name, show_text(self.name.replace("_", " ")))

    def ticks(self, limit: int) -> dict[str, Any]:
        """Plotly's tick settings with at most about ``limit`` labels."""
        step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 10**9) if len(self.labels) <= limit * s)
        at = list(range(0, len(self.labels), step))
        return {"tickmode": "array", "tickvals": at, "ticktext": [self.labels[i] for i in at]}


def axis_of(result: Result, dim: str, tokens: list[str] | None = None) -> Axis:
    """The labels of one axis of a result; ``tokens`` name the positions, which then keep their number."""
    if dim in result.values.coords:
        values = result.values[dim].values.tolist()
    else:
        values = list(range(result.data.sizes[dim]))
    if tokens is not None and dim == "position":
        if len(tokens) != len(values):
            raise ValueError(f"{len(tokens)} tokens for {len(values)} positions")
        return Axis(dim, values, [f"{i} {show_token(token)}" for i, token in enumerate(tokens)])
    names = result.values.coords.get("label")
    if names is not None and names.dims == (dim,):  # layer -1 of a lens is the embedding
        return Axis(dim, values, [show_text(name) for name in names.values.tolist()])
    if dim in ("position", "token"):
        return Axis(dim, values, [_show_place(str(value)) for value in values])
    return Axis(dim, values, [show_text(value) for value in values])


def _show_place(label: str) -> str:
    """``"-3  park"``: the number of a position, then its token."""
    number, space, token = label.partition(" ")
    return f"{number} {show_token(token)}" if space and number.lstrip("-").isdigit() else show_token(label)


def averaged(result: Result) -> Result:
    """The result with prompts averaged, further variables (``exact``, ``confirmed``) kept."""
    if PROMPT not in result.data.dims:
        return result
    mean = result.mean(PROMPT)
    extras = {
        name: value
        for name, value in result.values.data_vars.items()
        if PROMPT not in value.dims and name not in mean.values
    }
    return mean.map(lambda values: values.assign(extras))


def companions(result: Result, beside: Mapping[str, Result] | None = None) -> dict[str, Result]:
    """What is drawn in columns of its own beside a map of heads: whole attention blocks and MLPs, averaged."""
    given = dict(beside or {})
    for name, label in BESIDE.items():
        if not given.get(label) and name in result.values:
            effect = result.values[name]
            own = replace(result, values=xr.Dataset({"effect": effect}))
            given[label] = own
    return {label: averaged(other) for label, other in given.items()}


def heading(result: Result, title: str | None = None) -> str:
    """The title of a figure."""
    return show_text(title if title is not None else result.name.replace("_", " ").capitalize())


def quantity(result: Result, pixels: Number = 720) -> list[str]:
    """Unit and sign, as they stand at a colour bar or an axis, in lines that fit."""
    sign = f" ({result.sign})" if result.sign else ""
    wide = max(24, int(pixels / 6.3))
    whole = f"effect, {result.unit}{sign}"
    parts = [whole] if len(whole) <= wide else [f"effect, {result.unit}", sign.strip()]
    lines = [line for part in parts for line in textwrap.wrap(part, wide)]
    return [show_text(line) for line in lines]


def basis(result: Result) -> str:
    """What the numbers rest on: prompts, groups, intervals, seed, model."""
    statistics = result.provenance.get("statistics") or {}
    words: list[str] = []
    prompts, groups = statistics.get("n_prompts"), statistics.get("n_groups")
    if prompts is None and "n" in result.values:
        counts = result.values["n"].values
        prompts = int(np.nanmax(counts)) if counts.size else 0
    if prompts is not None:
        words.append(_count(prompts, "prompt") + (f" in {_count(groups, 'group')}" if groups is not None else ""))
    if result.has_statistics:
        level = f"{100 * float(statistics.get('confidence', 0.95)):g}% interval"
        words.append(f"{level}: bootstrap over {'groups' if groups is not None else 'prompts'}")
    seed = statistics.get("seed", result.provenance.get("seed"))
    if seed is not None:
        words.append(f"seed {seed}")
    if model := model_name(result.provenance):
        words.append(model)
    return " · ".join(words)


def model_name(provenance: Mapping[str, Any]) -> str:
    """The model's name, whether provenance holds the name or a record with one."""
    model = provenance.get("model")
    if isinstance(model, Mapping):
        record = {str(key): value for key, value in model.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        model = next((record[key] for key in ("name", "source", "path") if record.get(key)), "")
    name = str(model) if model else ""
    return Path(name).name if Path(name).is_absolute() else name


def statistic(result: Result, name: str) -> np.ndarray[Any, Any] | None:
    """One variable of an averaged result as float32 in the order of the effect's axes, None where it is not there."""
    if name not in result.values:
        return None
    return result.values[name].transpose(*result.data.dims).values.astype(np.float32)


def survives(result: Result, alpha: float = ALPHA) -> np.ndarray[Any, Any] | None:
    """Which cells stay after correction for the whole map; None where nothing was tested, or could have passed."""
    p = statistic(result, "p_maxt")
    return None if p is None or np.isnan(p).all() or too_few_groups(result, alpha) else p <= alpha


def too_few_groups(result: Result, alpha: float = ALPHA) -> int:
    """The number of groups where a sign-flip test of so many cannot reach ``alpha`` whatever the effect, else 0."""
    groups = (result.provenance.get("statistics") or {}).get("n_groups")
    return int(groups) if groups and 2.0 ** (1 - int(groups)) > alpha else 0


def hover_numbers(result: Result) -> tuple[np.ndarray[Any, Any] | None, str]:
    """Statistics of every cell as ``customdata`` and the lines of the hover box that read them."""
    names = [name for name in STATISTICS if name in result.values]
    if not names:
        return None, ""
    data = np.stack([statistic(result, name) for name in names], axis=-1)  # type: ignore[list-item]
    at = {name: f"%{{customdata[{i}]" for i, name in enumerate(names)}
    lines: list[str] = []
    if "ci_low" in at and "ci_high" in at:
        lines.append(f"interval [{at['ci_low']}:+.3f}}, {at['ci_high']}:+.3f}}]")
    lines += [f"{label:<8} {at[name]}:.2g}}" for name, label in _TESTS.items() if name in at]
    if "n" in at:
        lines.append(f"prompts  {at['n']}:.0f}}")
    return data, "<br>".join(lines)


_TESTS = {"p": "p", "p_maxt": "p maxT", "q": "q (BH)"}


def dress(
    figure: go.Figure, *, title: str, notes: list[str], height: Number, bottom: Number, top: Number = 0,
    left: Number = 64,
    right: Number = 24,
) -> go.Figure:  # fmt: skip
    """Template, title, the lines under it, and margins in pixels around a plot area ``height`` pixels high."""
    lines = [line for note in notes if note for line in textwrap.wrap(note, 130)]
    above = 46 + 17 * len(lines) + top
    return figure.update_layout(
        template=template("light"),
        title={
            "text": title, "x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top",
            "pad": {"t": 14}, "subtitle": {"text": "<br>".join(show_text(line) for line in lines)},
        },
        height=above + height + bottom,
        margin={"t": above, "b": bottom, "l": left, "r": right, "pad": 0},
    )  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
