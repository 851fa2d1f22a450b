"""Random cells of random edits: the suffix engine is the full forward pass."""

import numpy as np
import torch
from contract.subjects import pairs, sources, subject, worst
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mech_align.interventions import Intervention, add, patch, project_out, zero
from mech_align.metrics import logit_difference
from mech_align.models.names import parts_of
from mech_align.sites import HEAD_PARTS, Site
from mech_align.sweeps import Run, RunSource, sweep

SOME = [("gpt2", "hooked"), ("mistral", "bridge"), ("gpt_neox", "hooked"), ("gemma2", "bridge"), ("attn_only", "hooked")]


@st.composite
def interventions(draw: st.DrawFn, family: str, backend: str, names: list[str]) -> Intervention:
    shape, parts = subject(family, backend).shape, parts_of(subject(family, backend).inner)
    part = draw(st.sampled_from(parts))
    heads = shape.n_kv_heads if part in ("k", "v") else shape.n_heads
    head = draw(st.none() | st.integers(0, heads - 1)) if part in HEAD_PARTS else None
    neurons = draw(st.sets(st.integers(0, shape.d_mlp - 1), max_size=3)) if part == "mlp_post" else set()
    width = len(neurons) or {"mlp_post": shape.d_mlp}.get(part, shape.d_head if part in HEAD_PARTS else shape.d_model)
    vector = torch.randn(width, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    edits = [patch(), zero()] if part == "pattern" else [patch(), patch(), zero(), add(vector, 0.5), project_out(vector)]
    where = draw(st.sampled_from(["all", "last", "spot", "differs", 0, 1, -1, -3]))
    source = draw(st.sampled_from([name for name in names if part != "pattern" or name != "mean"]))
    site = Site(draw(st.integers(0, shape.n_layers - 1)), part, head=head)
    return Intervention(site, draw(st.sampled_from(edits)), where, tuple(sorted(neurons)), source)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(SOME), st.booleans(), st.integers(1, 5), st.integers(1, 60))
def test_random_cells(data: st.DataObject, which: tuple[str, str], denoise: bool, batch: int, budget: int) -> None:
    from mech_align.sweeps import sweep as public
    from mech_align.sweeps.suffix import SuffixEngine

    model, given_pairs = subject(*which), pairs()
    run = Run.corrupt(given_pairs) if denoise else Run.clean(given_pairs)
    source = RunSource.clean(given_pairs) if denoise else RunSource.corrupt(given_pairs)
    made = sources(model, run, source, None)
    cell = st.lists(interventions(*which, list(made)), min_size=1, max_size=4)
    plan = data.draw(st.lists(cell, min_size=1, max_size=6))
    assert SuffixEngine is not None and public is sweep
    quiet = lambda done, total: None  # noqa: E731
    fast = sweep(model, run, plan, metric=logit_difference(), sources=made, engine="suffix", batch_size=batch, progress=quiet)
    full = sweep(model, run, plan, metric=logit_difference(), sources=made, engine="full", progress=quiet)
    error = worst(fast.scores, full.scores)
    size = max(1.0, float(model.logits([list(row) for row in run.tokens]).abs().max()))
    assert error.max() <= 1e-5 * size, [[str(i) for i in c] for c in np.array(plan, dtype=object)[[int(error.max(0).argmax())]]]
