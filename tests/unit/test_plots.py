"""Pictures: what they show, what they refuse, and that text stays text."""

import json
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import xarray as xr

from mech_align import plots
from mech_align.errors import MechAlignError
from mech_align.plots.theme import COLOURS, in_theme, show_text, template
from mech_align.results import Result

PROMPTS, GROUPS = 24, 6


def made(dims: dict[str, Any], values: np.ndarray, name: str = "head_patching", **more: Any) -> Result:
    prompt = {
        "id": ("prompt", [f"p{i}" for i in range(PROMPTS)]),
        "group": ("prompt", [f"g{i % GROUPS}" for i in range(PROMPTS)]),
    }
    data = xr.Dataset({"effect": (("prompt", *dims), values), **more}, coords={**prompt, **dims})
    return Result(
        data,
        name,
        "fraction of the clean-corrupt gap",
        "positive = more clean behaviour",
        {"model": {"name": "toy"}, "seed": 0},
    )


def heads(layers: int = 6, width: int = 8, missing: int = 0) -> Result:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.01, (PROMPTS, layers, width))
    values[:, layers - 2, 3] += rng.normal(0.55, 0.08, PROMPTS)
    values[:, layers - 1, 5] += rng.normal(-0.4, 0.08, PROMPTS)
    values[:, :missing] = np.nan
    return made({"layer": range(layers), "head": range(width)}, values)


@cache
def large() -> Result:
    """A map of 64 layers, averaged once: the permutations take their time."""
    return heads(64, 40).mean("prompt", n_flips=99, n_resamples=99)


def traced() -> Result:
    rng = np.random.default_rng(1)
    values = rng.normal(0, 0.02, (PROMPTS, 2, 5, 4))
    values[:, 1, 2, 3] += 0.7
    return made({"part": ["attn_out", "mlp_out"], "layer": range(5), "position": range(4)}, values, "causal_tracing")


def lens(layers: int = 5) -> Result:
    values = np.random.default_rng(2).normal(0, 0.3, (PROMPTS, 2, layers)) + np.arange(layers)
    return made(
        {"intervention": ["none", "L4H1"], "layer": ["embed", *map(str, range(layers - 1))]}, values, "logit_lens"
    )


def parts() -> Result:
    names, layer, kind = ["embed"], [-1], ["embed"]
    for i in range(3):
        for h in range(8):
            names, layer, kind = [*names, f"L{i}H{h}"], [*layer, i], [*kind, "head"]
        names, layer, kind = [*names, f"L{i}.mlp", f"bias L{i}.attn"], [*layer, i, i], [*kind, "mlp", "bias"]
    names, layer, kind = [*names, "residual"], [*layer, 2], [*kind, "residual"]
    values = np.random.default_rng(3).normal(0, 0.05, (PROMPTS, len(names)))
    values[:, names.index("L2H3")] += 1.5
    values[:, -1] = 1e-6
    coords = {"component": names, "layer": ("component", layer), "kind": ("component", kind)}
    made_ = made({"component": names}, values, "logit_attribution", clean=("prompt", values.sum(1)))
    return made_.map(lambda data: data.assign_coords(coords))


def ablated(controls: int = 20) -> Result:
    names = ["L4H3", "L4H3+L5H5", *(f"control {i:02d}" for i in range(controls))]
    values = np.random.default_rng(4).normal(0, 0.05, (PROMPTS, len(names)))
    values[:, :2] += [0.5, 0.9]
    kind = ("cell", ["found", "joint", *["control"] * controls])
    return made({"cell": names}, values, "mean_ablation").map(lambda data: data.assign_coords(kind=kind))


def screened() -> Result:
    result = heads()
    exact = np.full((6, 8), np.nan)
    exact[4:, :] = result.data.mean("prompt").values[4:, :]
    exact[0, 0] = 0.01
    extra = {"exact": (("layer", "head"), exact)}
    provenance = {**result.provenance, "screen": {"miss_rate": 0.05, "miss_rate_interval": [0.01, 0.2]}}
    return Result(result.values.assign(extra), "attribution_patching", result.unit, result.sign, provenance)


def maps(figure: go.Figure) -> list[Any]:
    return [trace for trace in figure.data if trace.type == "heatmap" and trace.coloraxis]


def shown(figure: go.Figure) -> np.ndarray:
    """What is drawn in the first panel, survivors and others together."""
    traces = [np.asarray(trace.z, float) for trace in maps(figure) if trace.xaxis in (None, "x")]
    return np.nansum(traces, axis=0)


def layout(figure: go.Figure) -> dict[str, Any]:
    return json.loads(plots.figure_json(figure))["layout"]


EVERY = {
    "heatmap": lambda: plots.heatmap(heads()), "overview": lambda: plots.overview(heads()),
    "ranked": lambda: plots.ranked(heads()),
    "facets": lambda: plots.heatmap(traced()), "lines": lambda: plots.lines(lens()),
    "contributions": lambda: plots.contributions(parts()), "ablation": lambda: plots.ablation(ablated()),
    "screen": lambda: plots.screen(screened()),
}  # fmt: skip


@cache
def every(name: str) -> go.Figure:
    return EVERY[name]()


@pytest.mark.parametrize("name", EVERY)
def test_every_figure_is_dressed_and_survives_json(name: str) -> None:
    before = pio.templates.default
    figure = every(name)
    assert pio.templates.default == before
    text = plots.figure_json(figure)
    again = plots.read_figure(text)
    assert json.loads(plots.figure_json(again)) == json.loads(text)
    assert "sendChartToCloud" in figure.layout.template.layout.modebar.remove
    subtitle = figure.layout.title.subtitle.text
    assert "24 prompts in 6 groups" in subtitle and "95% interval" in subtitle and "toy" in subtitle
    assert "uirevision" not in text and "http" not in text


@pytest.mark.parametrize("name", EVERY)
def test_no_figure_colours_text_or_page_itself(name: str) -> None:
    # a page turns dark by changing the template alone: nothing that the template decides may be fixed in the figure
    own = layout(every(name))
    own.pop("template")
    assert "paper_bgcolor" not in own and "plot_bgcolor" not in own and "font" not in own
    for name, axis in own.items():
        if name.startswith(("xaxis", "yaxis")):
            assert not {"color", "gridcolor", "linecolor", "tickfont"} & set(axis)
        if name.startswith("coloraxis"):
            assert "colorscale" not in axis and axis["autocolorscale"]
    assert all("color" not in note.get("font", {}) for note in own.get("annotations", []))


def test_heatmap_is_symmetric_blue_positive_and_layer_0_on_top() -> None:
    figure = plots.heatmap(heads())
    bounds = figure.layout.coloraxis
    assert bounds.cmin == -bounds.cmax < -0.5
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    low, high = (template(theme).layout.colorscale.diverging[i][1] for theme, i in (("light", 0), ("light", -1)))
    red, blue = int(low[1:3], 16) - int(low[5:7], 16), int(high[5:7], 16) - int(high[1:3], 16)
    assert red > 0 and blue > 0, "the low end is red, the high end blue"
    np.testing.assert_allclose(shown(figure), heads().data.mean("prompt").values, atol=1e-6)
    title = figure.layout.coloraxis.colorbar.title.text
    assert "fraction of the clean-corrupt gap" in title and "positive = more clean behaviour" in title


def test_arrays_stay_float32() -> None:
    for trace in json.loads(plots.figure_json(plots.heatmap(large())))["data"]:
        assert trace["z"]["dtype"] == "f4"
    assert len(plots.figure_json(plots.heatmap(large()))) < 400_000


def test_survivors_are_full_and_outlined_the_others_faded() -> None:
    result = heads()
    kept = result.mean("prompt").values["p_maxt"].values <= 0.05
    assert 0 < kept.sum() < kept.size
    faded, full = maps(plots.heatmap(result))
    assert faded.opacity < 0.6 and full.opacity is None
    np.testing.assert_array_equal(np.isfinite(np.asarray(full.z, float)), kept)
    np.testing.assert_array_equal(np.isfinite(np.asarray(faded.z, float)), ~kept)
    assert f"{kept.sum()} of 48 cells" in plots.heatmap(result).layout.title.subtitle.text
    assert len(plots.heatmap(result, significance="outline").layout.shapes) == 1
    plain = plots.heatmap(result, significance="none")
    assert len(maps(plain)) == 1 and not plain.layout.shapes


def test_too_few_groups_fade_nothing_and_say_so() -> None:
    few = heads().map(lambda data: data.assign_coords(group=("prompt", [f"g{i % 4}" for i in range(PROMPTS)])))
    figure = plots.heatmap(few)
    (trace,) = maps(figure)
    assert trace.opacity is None and not figure.layout.shapes
    assert "4 groups of prompts are too few" in figure.layout.title.subtitle.text


def test_hover_holds_value_interval_tests_and_n() -> None:
    result = heads()
    mean = result.mean("prompt")
    trace = maps(plots.heatmap(result))[1]
    for word in ("L4H3", "interval", "p maxT", "q (BH)", "prompts"):
        assert word in trace.hovertemplate or any(word in text for row in trace.text for text in row)
    numbers = np.asarray(trace.customdata)[4, 3]
    expected = [float(mean.values[name].values[4, 3]) for name in ("ci_low", "ci_high", "p", "p_maxt", "q", "n")]
    np.testing.assert_allclose(numbers, expected, rtol=1e-5)


def test_unmeasured_cells_are_hatched_and_never_zero() -> None:
    figure = plots.heatmap(heads(missing=2))
    for trace in maps(figure):
        assert np.isnan(np.asarray(trace.z, float)[:2]).all()
    hatched = [trace for trace in figure.data if "not measured" in (trace.hovertemplate or "")]
    assert len(hatched) == 1 and np.isfinite(np.asarray(hatched[0].z, float)).sum() == 16
    assert "hatched: not measured" in figure.layout.title.subtitle.text
    assert not [trace for trace in plots.heatmap(heads()).data if "not measured" in (trace.hovertemplate or "")]


def test_attention_and_mlp_have_a_scale_of_their_own() -> None:
    result = heads()
    big = np.random.default_rng(5).normal(11, 1, (PROMPTS, 6))
    with_columns = result.map(
        lambda data: data.assign(attn_out=(("prompt", "layer"), big / 10), mlp_out=(("prompt", "layer"), big))
    )
    beside = {"MLP": with_columns.map(lambda data: data[["mlp_out"]].rename(mlp_out="effect"))}
    for figure, columns in (
        (plots.heatmap(with_columns), 2),
        (plots.heatmap(result, beside=beside), 1),
        (plots.overview(with_columns), 2),
    ):
        assert figure.layout.coloraxis.cmax < 1 < 10 < figure.layout.coloraxis2.cmax
        own = {trace.xaxis for trace in maps(figure) if trace.coloraxis == "coloraxis2"}
        assert len(own) == columns
    with pytest.raises(MechAlignError, match="MLP"):
        plots.heatmap(result, beside={"MLP": heads(4, 8).map(lambda data: data.isel(head=0, drop=True))})


def test_shapes_of_results() -> None:
    panels = plots.heatmap(traced())
    assert len({trace.xaxis for trace in maps(panels)}) == 2
    assert {trace.coloraxis for trace in maps(panels)} == {"coloraxis"}, "panels to be compared share their scale"
    assert [note.text for note in panels.layout.annotations] == ["attn_out", "mlp_out"]
    one = plots.heatmap(lens().select(intervention="none"))
    assert shown(one).shape == (5, 1) and one.layout.yaxis.ticktext == ("embed", "0", "1", "2", "3")
    across = plots.heatmap(traced().select(part="mlp_out"))
    assert across.layout.yaxis.title.text == "layer" and across.layout.xaxis.title.text == "position"
    averaged = heads().mean("prompt")
    assert plots.heatmap(averaged).layout.coloraxis.cmax == pytest.approx(plots.heatmap(heads()).layout.coloraxis.cmax)
    wide = made({"layer": range(3), "head": range(12), "position": range(20)}, np.zeros((PROMPTS, 3, 12, 20)))
    with pytest.raises(MechAlignError, match="select"):
        plots.heatmap(wide)
    assert len({trace.xaxis for trace in maps(plots.heatmap(wide, facet="head"))}) == 12
    with pytest.raises(MechAlignError, match="no axis 'color'"):
        plots.heatmap(wide, facet="color")


def test_a_flat_map_and_an_unmeasured_map_still_draw() -> None:
    flat = plots.heatmap(made({"layer": range(2), "head": range(2)}, np.zeros((PROMPTS, 2, 2))))
    assert flat.layout.coloraxis.cmax == 1
    empty = made({"layer": range(2), "head": range(2)}, np.full((PROMPTS, 2, 2), np.nan)).mean("prompt")
    assert plots.heatmap(empty).layout.coloraxis.cmax == 1
    assert plots.ranked(empty) is not None


def test_tokens_are_shown_as_they_are_and_apart() -> None:
    assert plots.show_token(" the") == "·the"
    assert plots.show_token("<b>x</b>") == "&lt;b&gt;x&lt;/b&gt;"
    assert plots.show_token("a\n\tb\r\n") == "a↩→b↩"
    assert plots.show_token("\x00") == "\\x00"
    assert "$" not in show_text("$a$ and %{x}") and "%{" not in show_text("%{x}")
    figure = plots.heatmap(traced().select(part="mlp_out"), tokens=["<s>", " in", " in", "\n"])
    axis = figure.layout.xaxis
    assert axis.ticktext == ("0 &lt;s&gt;", "1 ·in", "2 ·in", "3 ↩")
    assert axis.tickvals == (0, 1, 2, 3), "equal tokens keep a column each"


def test_markup_in_names_is_escaped_everywhere() -> None:
    result = lens().select(intervention="none")
    evil = Result(result.values, "<a href='x'>", "<b>", "<i>", {"model": "<script>", "seed": 0})
    for figure in (plots.heatmap(evil), plots.lines(evil), plots.ranked(evil)):
        text = plots.figure_json(figure).replace("\\u003c", "<").replace("\\u003e", ">")
        for tag in ("<a href", "<i>", "<script>"):
            assert tag not in text


def test_large_cells_carry_numbers_small_ones_do_not() -> None:
    assert any(trace.texttemplate for trace in maps(plots.heatmap(heads())))
    assert not any(trace.texttemplate for trace in maps(plots.heatmap(large())))


def test_ranked_is_ordered_and_carries_intervals() -> None:
    mean = heads().mean("prompt")
    (trace,) = plots.ranked(mean, 5).data
    assert list(trace.text[:2]) == ["L4H3", "L5H5"]
    assert np.all(np.diff(np.abs(np.asarray(trace.x))) <= 0)
    low = float(mean.values["ci_low"].sel(layer=4, head=3))
    assert trace.x[0] - trace.error_x.arrayminus[0] == pytest.approx(low, abs=1e-5)
    assert trace.marker.symbol[0] == "circle" and trace.marker.symbol[-1] == "circle-open"


def test_lines_have_bands_and_differ_in_more_than_colour() -> None:
    figure = plots.lines(lens())
    curves = [trace for trace in figure.data if trace.mode == "lines+markers"]
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert [curve.name for curve in curves] == ["none", "L4H1"] and len(bands) == 2
    assert len({(c.line.color, c.line.dash, c.marker.symbol) for c in curves}) == 2
    assert len({c.line.dash for c in curves}) == 2
    with pytest.raises(MechAlignError, match="select"):
        plots.lines(heads(4, 40))
    broken = lens().map(lambda data: data.assign(effect=data["effect"].where(data["layer"] != "1")))
    assert len([trace for trace in plots.lines(broken).data if trace.fill == "toself"]) == 4, "no band across a hole"


def test_contributions_name_outliers_and_say_that_parts_add_up() -> None:
    figure = plots.contributions(parts())
    assert "L2H3" in [note.text for note in figure.layout.annotations]
    assert len(figure.layout.annotations) <= 12
    assert "sum of parts" in figure.layout.title.subtitle.text and "e-06" in figure.layout.title.subtitle.text
    assert {trace.name for trace in figure.data if trace.name} == {"heads, summed", "MLP", "biases", "embeddings"}
    summed = next(trace for trace in figure.data if trace.name == "heads, summed")
    values = parts().data.mean("prompt")
    third = values.where((values["kind"] == "head") & (values["layer"] == 2)).sum()
    assert summed.y[-1] == pytest.approx(float(third), abs=1e-5) and summed.error_y.array[-1] > 0
    with pytest.raises(MechAlignError, match="components"):
        plots.contributions(heads())


def test_ablation_stands_beside_its_controls() -> None:
    figure = plots.ablation(ablated())
    strip = next(trace for trace in figure.data if "random controls" in trace.name)
    assert len(strip.x) == 20
    found = next(trace for trace in figure.data if trace.name == "found")
    assert "larger than 20 of 20" in found.text[0] and found.error_x.array[0] > 0
    bands = figure.layout.shapes
    assert len(bands) == 2, "one behind the found heads, one behind the joint set"
    assert all(band.x0 == pytest.approx(min(strip.x)) and band.x1 == pytest.approx(max(strip.x)) for band in bands)
    kinds = ["found", "joint", *["control"] * 10, *["control single"] * 10]
    both = plots.ablation(ablated().map(lambda data: data.assign_coords(kind=("cell", kinds))))
    strips = [trace for trace in both.data if "random controls" in trace.name]
    assert [len(trace.x) for trace in strips] == [10, 10]
    found = next(trace for trace in both.data if trace.name == "found")
    assert "of 10 controls" in found.text[0]
    assert both.layout.shapes[0].x1 == pytest.approx(max(strips[1].x)), "single heads are compared with single heads"
    assert "no random controls" in plots.ablation(ablated(0)).layout.title.subtitle.text
    with pytest.raises(MechAlignError):
        plots.ablation(heads())


def test_screen_tells_the_top_from_the_sampled_rest() -> None:
    figure = plots.screen(screened())
    assert [trace.name for trace in figure.data][-1] == "random sample of the rest (15)" or len(figure.data) == 2
    assert "miss rate 5% [1, 20]" in figure.layout.title.subtitle.text
    top = figure.data[0]
    assert "L4H3" in top.text and top.y[list(top.text).index("L4H3")] > 0.4
    with pytest.raises(MechAlignError, match="confirm"):
        plots.screen(heads())


def test_pictures_suit_the_result() -> None:
    assert list(plots.pictures(heads())) == ["head_patching"]
    assert list(plots.pictures(screened())) == ["attribution_patching", "attribution_patching_screen"]
    assert any(trace.fill == "toself" for trace in plots.pictures(lens())["logit_lens"].data)
    assert plots.pictures(ablated())["mean_ablation"].layout.shapes
    assert plots.pictures(parts())["logit_attribution"].layout.yaxis2.title.text
    assert len(maps(plots.pictures(traced())["causal_tracing"])) >= 2
    neurons = made(
        {"layer": range(2), "neuron": range(300)},
        np.random.default_rng(0).normal(0, 1, (PROMPTS, 2, 300)),
        "neuron_patching",
    )
    assert not maps(plots.pictures(neurons)["neuron_patching"])


def luminance(colour: str) -> float:
    parts_ = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts_)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme: Any) -> None:
    own = template(theme).layout
    page = luminance(own.paper_bgcolor)

    def contrast(colour: str) -> float:
        light, dark = sorted((luminance(colour), page), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert contrast(own.font.color) > 7 and contrast(own.title.subtitle.font.color) > 4.5
    assert min(contrast(colour) for colour in COLOURS[:4]) > 2.9
    middle = own.colorscale.diverging[5][1]
    assert contrast(middle) < 1.25, "no effect fades into the page"
    figure = in_theme(plots.heatmap(heads()), theme)
    assert figure.layout.template.layout.paper_bgcolor == own.paper_bgcolor


def test_torch_stays_out() -> None:
    code = "import sys, mech_align.plots, mech_align.runs; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
