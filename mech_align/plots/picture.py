"""The pictures that suit a result, for reports and for callers who do not want to choose."""

import plotly.graph_objects as go

from mech_align.plots._facts import averaged
from mech_align.plots.ablation import ablation
from mech_align.plots.contributions import contributions
from mech_align.plots.heatmap import heatmap
from mech_align.plots.lines import lines
from mech_align.plots.overview import overview
from mech_align.plots.ranked import ranked
from mech_align.plots.screen import screen
from mech_align.results import Result

_MOST_CELLS = 20_000
"""A map of more cells weighs megabytes and shows less than a list."""
_MOST_LINES = 6


def pictures(result: Result, *, mean: Result | None = None) -> dict[str, go.Figure]:
    """One or more figures by name, the main one first and named like the result.

    Args:
        mean: The averaged result, where it is at hand already.
    """
    mean = mean if mean is not None else averaged(result)
    dims = {str(dim): int(size) for dim, size in mean.data.sizes.items()}
    coords = set(map(str, mean.values.coords))
    if "component" in dims and {"layer", "kind"} <= coords:
        return {result.name: contributions(result)}
    if "cell" in dims and "kind" in coords and len(dims) == 1:
        return {result.name: ablation(mean)}
    drawn = {result.name: _map_or_list(mean, dims, result)}
    if "exact" in mean.values and bool(mean.values["exact"].notnull().any()):
        drawn[f"{result.name}_screen"] = screen(mean)
    return drawn


def _map_or_list(mean: Result, dims: dict[str, int], result: Result) -> go.Figure:
    others = [size for dim, size in dims.items() if dim != "layer"]
    if "layer" in dims and len(others) <= 1 and not {"head", "position", "neuron"} & set(dims):
        if not others or others[0] <= _MOST_LINES:
            return lines(mean)
    if mean.data.size > _MOST_CELLS or len(dims) not in (2, 3) or "neuron" in dims:
        return ranked(mean, 30)
    if len(dims) == 3:
        facets = [dim for dim in dims if dim in ("part", "intervention")]
        return heatmap(mean, facet=facets[0]) if facets else ranked(mean, 30)
    beside = {name: result.values[name] for name in ("attn_out", "mlp_out") if name in result.values}
    whole = mean.map(lambda values: values.assign({n: v for n, v in beside.items() if n not in values}))
    return overview(whole)
