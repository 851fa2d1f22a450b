"""Effects of interventions on prompts: the one fast path under every causal analysis."""

from mech_align.sweeps.cost import Cost, estimate
from mech_align.sweeps.effects import Effects, SweepOptions, encode, patch_effects
from mech_align.sweeps.sources import MeanSource, NoiseSource, Run, RunSource, Source
from mech_align.sweeps.sweep import Cell, Sweep, score, sweep

__all__ = [
    "Cell", "Cost", "Effects", "MeanSource", "NoiseSource", "Run", "RunSource", "Source", "Sweep", "SweepOptions",
    "encode", "estimate", "patch_effects", "score", "sweep",
]  # fmt: skip
