"""Figures as files, and what a page needs to draw them without a network."""

import json
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from mech_align.plots.theme import CONFIG, Theme, template


def figure_json(figure: go.Figure) -> str:
    """The figure as JSON, arrays as compact as they are in memory."""
    text = pio.to_json(figure, validate=True, engine="json")
    assert text is not None
    return text


def read_figure(text: str) -> go.Figure:
    """A figure from what ``figure_json`` wrote."""
    return go.Figure(json.loads(text))


def plotly_js() -> str:
    """The whole of plotly.js, to be written into a page once."""
    return get_plotlyjs()


def page_settings() -> Mapping[str, Any]:
    """What a script needs beside the figures: both templates and the configuration of every chart."""
    themes: tuple[Theme, Theme] = ("light", "dark")
    return {"templates": {theme: template(theme).to_plotly_json() for theme in themes}, "config": CONFIG}
