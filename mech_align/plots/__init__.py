"""Results become Plotly figures. The only room that imports plotly; nothing here shows one or changes a default."""

from mech_align.plots._facts import averaged
from mech_align.plots.ablation import ablation
from mech_align.plots.contributions import contributions
from mech_align.plots.files import figure_json, page_settings, plotly_js, read_figure
from mech_align.plots.heatmap import heatmap
from mech_align.plots.lines import lines
from mech_align.plots.overview import overview
from mech_align.plots.picture import pictures
from mech_align.plots.ranked import ranked
from mech_align.plots.screen import screen
from mech_align.plots.theme import show_token

__all__ = [
    "ablation", "averaged", "contributions", "figure_json", "heatmap", "lines", "overview", "page_settings", "pictures",
    "plotly_js", "ranked", "read_figure", "screen", "show_token",
]  # fmt: skip
