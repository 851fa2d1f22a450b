"""Effects of interventions on prompts: the one fast path under every causal analysis."""

from mech_align.sweeps.cost import Cost, estimate
from mech_align.sweeps.sources import MeanSource, Run, RunSource, Source
from mech_align.sweeps.sweep import Cell, Sweep, score, sweep

__all__ = ["Cell", "Cost", "MeanSource", "Run", "RunSource", "Source", "Sweep", "estimate", "score", "sweep"]
