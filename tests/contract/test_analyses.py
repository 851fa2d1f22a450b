"""Every analysis gives the same numbers on both backends."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contract.subjects import COVERED, UNCOVERED, fresh, pairs, subject

from mech_align.analyses.attribution_patching import attribution_patching
from mech_align.analyses.causal_tracing import causal_tracing
from mech_align.analyses.head_patching import head_patching
from mech_align.analyses.logit_attribution import logit_attribution
from mech_align.analyses.logit_lens import logit_lens
from mech_align.analyses.mean_ablation import mean_ablation
from mech_align.analyses.neuron_patching import neuron_patching
from mech_align.errors import UnknownSite, UnsupportedModel
from mech_align.models import Model
from mech_align.results import Result
from mech_align.sites import Site
from mech_align.sweeps import SweepOptions

PAIRS = pairs()
QUIET = SweepOptions(progress=lambda done, total: None)
SETS = {"two": [Site(1, "mlp_post", neuron=3), Site(2, "mlp_post", neuron=4)], "one": [Site(0, "mlp_post", neuron=0)]}

ANALYSES: dict[str, Callable[[Model, Model | None], Result]] = {
    "head_patching": lambda m, o: head_patching(m, PAIRS, options=QUIET),
    "head_patching by position": lambda m, o: head_patching(m, PAIRS, layers=[2], positions="each", options=QUIET),
    "head_patching values, noising": lambda m, o: head_patching(m, PAIRS, part="v", direction="noise", options=QUIET),
    "head_patching other model": lambda m, o: head_patching(m, PAIRS, source_model=o, layers=[1, 2], options=QUIET),
    "neuron_patching": lambda m, o: neuron_patching(m, PAIRS, sets=SETS, positions="spot", options=QUIET),
    "causal_tracing": lambda m, o: causal_tracing(m, PAIRS, layers=[0, 2], positions="last", window=2, options=QUIET),
    "causal_tracing noise": lambda m, o: causal_tracing(
        m, PAIRS, parts=["resid_post"], layers=[1], corruption="noise", noise_draws=2, positions="all", options=QUIET
    ),
    "mean_ablation": lambda m, o: mean_ablation(m, PAIRS, "L1H2,L2H0", controls=4, options=QUIET),
    "mean_ablation resample": lambda m, o: mean_ablation(
        m, PAIRS, "L1H2", mode="resample", controls=2, resample_draws=2, options=QUIET
    ),
    "mean_ablation model": lambda m, o: mean_ablation(
        m, PAIRS, "L1.mlp", mode="model", source_model=o, controls=1, options=QUIET
    ),
    "logit_attribution": lambda m, o: logit_attribution(m, PAIRS),
    "logit_lens": lambda m, o: logit_lens(m, PAIRS),
    "attribution_patching": lambda m, o: attribution_patching(m, PAIRS, confirm=3, sample=3, options=QUIET),
}


def same(one: Result, two: Result, tolerance: float = 1e-4) -> None:
    assert one.data.dims == two.data.dims and one.data.shape == two.data.shape
    for name, values in one.values.data_vars.items():
        mine, other = values.values, two.values[name].values
        if mine.dtype.kind == "f":
            assert np.array_equal(np.isnan(mine), np.isnan(other)), name
            size = max(1.0, float(np.nanmax(np.abs(mine), initial=0.0)))
            assert np.nanmax(np.abs(mine - other), initial=0.0) <= tolerance * size, name
    assert np.isfinite(one.data.values).any()


@pytest.mark.parametrize("family", [*COVERED, UNCOVERED])
def test_backends_agree(family: str) -> None:
    number = [*COVERED, UNCOVERED].index(family)
    models = [subject(family, backend) for backend in ("hooked", "bridge")]
    other = subject(family, "bridge", 1)
    names = list(ANALYSES)
    # The main map of every family, and a third of all analyses in turn, so that each one meets four families.
    for at, name in enumerate(names):
        if name != "head_patching" and at % 3 != number % 3:
            continue
        if name == "logit_attribution" and family == UNCOVERED:
            for model in models:
                with pytest.raises(UnsupportedModel):
                    ANALYSES[name](model, other)
            continue
        try:
            found = [ANALYSES[name](model, other) for model in models]
            same(*found)
        except AssertionError as error:
            raise AssertionError(f"{name} of {family}: {error}") from error


def test_folded_weights_give_the_same_map() -> None:
    raw = head_patching(subject("gpt2", "hooked"), PAIRS, options=QUIET)
    for family, backend in [("gpt2", "hooked"), ("gpt2", "bridge"), ("llama", "hooked")]:
        folded = fresh(family, backend, weights="folded")
        plain = raw if family == "gpt2" else head_patching(subject(family, backend), PAIRS, options=QUIET)
        found = head_patching(folded, PAIRS, options=QUIET)
        assert folded.provenance["weights"] == "folded"
        assert np.nanmax(np.abs(found.data.values - plain.data.values)) <= 1e-3


def test_a_part_that_the_model_lacks_is_an_error() -> None:
    with pytest.raises(UnknownSite, match="resid_mid"):
        causal_tracing(subject("gpt_neox", "hooked"), PAIRS, parts=["resid_mid"], options=QUIET)
    bare: Any = causal_tracing(subject("attn_only", "hooked"), PAIRS, layers=[0], positions="last", options=QUIET)
    assert list(bare.values["part"].values) == ["attn_out", "resid_post"]
