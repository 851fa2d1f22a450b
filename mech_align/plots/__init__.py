"""Results become Plotly figures. The only room that imports plotly; nothing here shows a figure or changes a default."""

from mech_align.plots.heatmap import heatmap

__all__ = ["heatmap"]
