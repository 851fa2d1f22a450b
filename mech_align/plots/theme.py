"""How every figure looks: two templates, colours that colour-blind readers can tell apart, and text that stays text."""

import html
import re
from typing import Any, Literal

import plotly.graph_objects as go

Theme = Literal["light", "dark"]
Number = int | float
"""Pixels, and other lengths that are counted or computed."""

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY = "#808790"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
"""Okabe and Ito's palette; the first four keep a contrast of 3:1 on the light and on the dark page."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x")

SANS = "Inter, system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"

# ColorBrewer's RdBu, blue positive. On a dark page the middle is dark and both ends are bright.
_DIVERGING = {
    "light": (
        "#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7",
        "#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061",
    ),
    "dark": (
        "#ffd9cb", "#fca68a", "#e8704f", "#b8452b", "#6b2e25", "#1f262e",
        "#1d4668", "#2873ad", "#4da0da", "#8fcbf3", "#d6eeff",
    ),
}  # fmt: skip
_SEQUENTIAL = {"light": ("#f7fbff", "#6baed6", "#08306b"), "dark": ("#1f262e", "#4da0da", "#d6eeff")}
_PAGE = {"light": "#ffffff", "dark": "#14181d"}
_INK = {"light": "#1b1f24", "dark": "#e4e7ea"}
_SOFT = {"light": "#57606a", "dark": "#a3abb4"}
_GRID = {"light": "#e7eaed", "dark": "#2b323a"}
_LINE = {"light": "#9aa2ab", "dark": "#626b75"}

CONFIG: dict[str, Any] = {"displaylogo": False, "showSendToCloud": False, "responsive": True}
"""For ``figure.show(config=CONFIG)``: no logo, no upload to a cloud. The templates remove the upload button as well."""


def template(theme: Theme = "light") -> go.layout.Template:
    """Layout defaults of a figure. Figures leave to them what depends on the page: one call turns a figure dark.

    The button that uploads a chart to a company's cloud, on by default in Plotly 7, is removed: hover text may hold
    prompts and unpublished results.
    """
    axis = {
        "gridcolor": _GRID[theme], "linecolor": _LINE[theme], "zerolinecolor": _LINE[theme], "zerolinewidth": 1,
        "tickcolor": _LINE[theme], "ticks": "outside", "ticklen": 4, "title": {"standoff": 8, "font": {"size": 13}},
        "automargin": False, "showgrid": False, "zeroline": False,
    }  # fmt: skip
    bar = {
        "outlinewidth": 0,
        "title": {"font": {"size": 12}},
        "ticks": "outside",
        "ticklen": 3,
        "tickcolor": _LINE[theme],
    }
    return go.layout.Template(
        layout={
            "paper_bgcolor": _PAGE[theme],
            "plot_bgcolor": _PAGE[theme],
            "font": {"family": SANS, "size": 12, "color": _INK[theme]},
            "title": {"font": {"size": 17}, "subtitle": {"font": {"size": 12, "color": _SOFT[theme]}}},
            "colorway": list(COLOURS),
            "colorscale": {
                "diverging": _scale(_DIVERGING[theme]),
                "sequential": _scale(_SEQUENTIAL[theme]),
                "sequentialminus": _scale(_SEQUENTIAL[theme][::-1]),
            },
            "coloraxis": {"colorbar": bar},
            "hoverlabel": {
                "font": {"family": MONO, "size": 12, "color": _INK[theme]}, "bgcolor": _GRID[theme],
                "bordercolor": _LINE[theme], "align": "left",
            },
            "hovermode": "closest",
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"bgcolor": "rgba(0,0,0,0)", "font": {"size": 12}},
            "annotationdefaults": {"font": {"color": _SOFT[theme], "size": 12}, "showarrow": False},
            "shapedefaults": {"line": {"color": _INK[theme], "width": 1.5}, "fillcolor": "rgba(0,0,0,0)"},
            "modebar": {
                "remove": ["sendChartToCloud", "lasso2d", "select2d", "autoScale2d"], "bgcolor": "rgba(0,0,0,0)",
                "color": _SOFT[theme], "activecolor": _INK[theme],
            },
        }
    )  # fmt: skip


def in_theme(figure: go.Figure, theme: Theme) -> go.Figure:
    """A copy of the figure for a light or for a dark page."""
    return go.Figure(figure).update_layout(template=template(theme))


def show_text(text: object) -> str:
    """Text that Plotly draws as it stands: it takes ``<b>``, ``&lt;`` and ``$x$`` for markup otherwise."""
    return html.escape(str(text), quote=False).replace("$", "&#36;").replace("%{", "%&#123;")


def show_token(token: str) -> str:
    """A token as a label: markup escaped, blanks and line breaks visible.

    ``" the"`` is ``·the``, a newline ``↩``, a tab ``→``, ``<s>`` stays ``<s>``; unprintable characters become codes.
    """
    visible = token.replace("\r\n", "↩").replace("\n", "↩").replace("\t", "→").replace(" ", "·")
    return show_text("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in visible))


def tint(colour: str, alpha: float) -> str:
    """The colour, let through by ``1 - alpha``."""
    red, green, blue = (int(part, 16) for part in re.findall("..", colour.lstrip("#")))
    return f"rgba({red},{green},{blue},{alpha})"


def _scale(colours: tuple[str, ...]) -> list[list[Any]]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]
