"""Random cells of random edits: the suffix engine is the full forward pass."""

from typing import Any

import torch
from contract.subjects import pairs, sources, subject, worst
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mech_align.interventions import Edit, Intervention, add, patch, project_out, zero
from mech_align.metrics import logit_difference
from mech_align.models.names import parts_of
from mech_align.sites import HEAD_PARTS, PARTS, Site
from mech_align.sweeps import Run, RunSource, sweep

SOME = [
    ("gpt2", "hooked"),
    ("mistral", "bridge"),
    ("gpt_neox", "hooked"),
    ("gemma2", "bridge"),
    ("attn_only", "hooked"),
]

# Plain data: what is made of it depends on the model.
EDITS = st.tuples(
    st.integers(0, 2), st.sampled_from(PARTS), st.none() | st.integers(0, 3), st.sets(st.integers(0, 39), max_size=3),
    st.sampled_from(["patch", "patch", "zero", "add", "project_out"]),
    st.sampled_from(["all", "last", "spot", "differs", 0, 1, -1, -3]), st.sampled_from(["source", "mean", "resample"]),
)  # fmt: skip


def built(
    which: tuple[str, str],
    layer: int,
    part: str,
    head: int | None,
    neurons: set[int],
    kind: str,
    where: str | int,
    source: str,
) -> Intervention:
    model = subject(*which)
    shape, here = model.shape, parts_of(model.inner)
    part = part if part in here else "resid_post"
    heads = shape.n_kv_heads if part in ("k", "v") else shape.n_heads
    chosen = tuple(sorted(neurons)) if part == "mlp_post" else ()
    width = len(chosen) or {"mlp_post": shape.d_mlp}.get(part, shape.d_head if part in HEAD_PARTS else shape.d_model)
    vector = torch.randn(width, generator=torch.Generator().manual_seed(layer))
    if part == "pattern":
        kind, source = "zero" if kind == "zero" else "patch", "source" if source == "mean" else source
    edits: dict[str, Edit] = {
        "patch": patch(), "zero": zero(), "add": add(vector, 0.5), "project_out": project_out(vector)
    }  # fmt: skip
    site = Site(layer, part, head=head % heads if head is not None and part in HEAD_PARTS else None)
    return Intervention(site, edits[kind], where, chosen, source)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(SOME), st.lists(st.lists(EDITS, min_size=1, max_size=4), min_size=1, max_size=6), st.booleans(),
    st.integers(1, 5),
)  # fmt: skip
def test_random_cells(which: tuple[str, str], drawn: list[list[Any]], denoise: bool, batch: int) -> None:
    model, given_pairs = subject(*which), pairs()
    plan = [[built(which, *edit) for edit in cell] for cell in drawn]
    run = Run.corrupt(given_pairs) if denoise else Run.clean(given_pairs)
    source = RunSource.clean(given_pairs) if denoise else RunSource.corrupt(given_pairs)
    made = sources(model, run, source, None)
    how: Any = {"metric": logit_difference(), "sources": made, "progress": lambda done, total: None}
    fast = sweep(model, run, plan, engine="suffix", batch_size=batch, **how)
    full = sweep(model, run, plan, engine="full", **how)
    error = worst(fast.scores, full.scores)
    size = max(1.0, float(model.logits([list(row) for row in run.tokens]).abs().max()))
    assert error.max() <= 1e-5 * size, [str(i) for i in plan[int(error.max(0).argmax())]]
