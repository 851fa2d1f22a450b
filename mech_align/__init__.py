"""Mechanistic interpretability for alignment: which part of a model does what, with intervals and controls.

The names below load on first use (PEP 562): ``import mech_align`` itself loads neither torch nor transformer_lens.
"""

import importlib
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mech_align import plots as plots
    from mech_align import stats as stats
    from mech_align.analyses.attribution_patching import attribution_patching as attribution_patching
    from mech_align.analyses.causal_tracing import causal_tracing as causal_tracing
    from mech_align.analyses.head_patching import head_patching as head_patching
    from mech_align.analyses.logit_attribution import logit_attribution as logit_attribution
    from mech_align.analyses.logit_lens import logit_lens as logit_lens
    from mech_align.analyses.mean_ablation import mean_ablation as mean_ablation
    from mech_align.analyses.neuron_patching import neuron_patching as neuron_patching
    from mech_align.errors import MechAlignError as MechAlignError
    from mech_align.metrics import Metric as Metric
    from mech_align.metrics import log_odds as log_odds
    from mech_align.metrics import log_probability as log_probability
    from mech_align.metrics import logit_difference as logit_difference
    from mech_align.metrics import probability as probability
    from mech_align.models import Model as Model
    from mech_align.models import check_pad_invariance as check_pad_invariance
    from mech_align.models import load_model as load_model
    from mech_align.models import wrap_model as wrap_model
    from mech_align.plots import heatmap as heatmap
    from mech_align.plots import overview as overview
    from mech_align.plots import ranked as ranked
    from mech_align.prompts import LabelledPrompts as LabelledPrompts
    from mech_align.prompts import Pairs as Pairs
    from mech_align.prompts import load_pairs as load_pairs
    from mech_align.prompts import load_prompts as load_prompts
    from mech_align.results import Result as Result
    from mech_align.results import load_result as load_result
    from mech_align.sites import Site as Site

# name -> module that holds it. tests/unit/test_public_names.py keeps this and the block above the same.
_HOMES = {
    "LabelledPrompts": "prompts",
    "MechAlignError": "errors",
    "Metric": "metrics",
    "Model": "models",
    "Pairs": "prompts",
    "Result": "results",
    "Site": "sites",
    "attribution_patching": "analyses.attribution_patching",
    "causal_tracing": "analyses.causal_tracing",
    "check_pad_invariance": "models",
    "head_patching": "analyses.head_patching",
    "heatmap": "plots",
    "load_model": "models",
    "load_pairs": "prompts",
    "load_prompts": "prompts",
    "load_result": "results",
    "log_odds": "metrics",
    "log_probability": "metrics",
    "logit_attribution": "analyses.logit_attribution",
    "logit_difference": "metrics",
    "logit_lens": "analyses.logit_lens",
    "mean_ablation": "analyses.mean_ablation",
    "neuron_patching": "analyses.neuron_patching",
    "overview": "plots",
    "probability": "metrics",
    "ranked": "plots",
    "wrap_model": "models",
}

# Rooms that are worth a look as a whole: ma.plots.lines, ma.stats.split_half.
_ROOMS = ("plots", "stats")

__all__ = ["__version__", *_HOMES, *_ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value  # the next look-up is an ordinary one
        return value
    names = sorted([*_HOMES, *_ROOMS])
    near = get_close_matches(name, names, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; it offers {', '.join(names)}"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
