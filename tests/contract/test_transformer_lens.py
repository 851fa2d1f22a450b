"""The same maps as TransformerLens' own patching functions, on both of its kinds of model."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from contract.subjects import hooked, pairs, subject
from torch import Tensor

from mech_align.analyses.head_patching import head_patching
from mech_align.interventions import Intervention, patch
from mech_align.metrics import logit_difference
from mech_align.models import Model, wrap_model
from mech_align.models.names import parts_of
from mech_align.sites import Site
from mech_align.sweeps import Run, RunSource, sweep

patching = pytest.importorskip("transformer_lens.patching")

MAPS = [
    ("get_act_patch_attn_head_out_all_pos", "z", False), ("get_act_patch_attn_head_out_by_pos", "z", True),
    ("get_act_patch_resid_pre", "resid_pre", True), ("get_act_patch_resid_mid", "resid_mid", True),
    ("get_act_patch_mlp_out", "mlp_out", True), ("get_act_patch_attn_out", "attn_out", True),
    ("get_act_patch_attn_head_q_all_pos", "q", False), ("get_act_patch_attn_head_k_all_pos", "k", False),
    ("get_act_patch_attn_head_v_all_pos", "v", False), ("get_act_patch_attn_head_pattern_all_pos", "pattern", False),
]  # fmt: skip
EQUAL = pairs(ragged=False)


def models() -> dict[str, Model]:
    """Absolute positions: TransformerLens calls the rotated queries and keys otherwise."""
    return {
        "own HookedTransformer": wrap_model(hooked()), "hooked gpt2": subject("gpt2", "hooked"),
        "bridge gpt2": subject("gpt2", "bridge"), "bridge llama": subject("llama", "bridge"),
        "hooked llama": subject("llama", "hooked"), "hooked gpt_neox": subject("gpt_neox", "hooked"),
    }  # fmt: skip


def theirs(model: Model, function: str, row: int) -> np.ndarray[Any, Any]:
    """TransformerLens' map for one pair (it averages over a batch)."""
    clean, corrupt = torch.tensor([EQUAL.clean[row]]), torch.tensor([EQUAL.corrupt[row]])
    answer, wrong = list(EQUAL.answer[row]), list(EQUAL.wrong[row])

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, answer].mean() - logits[0, -1, wrong].mean()

    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        _, cache = model.inner.run_with_cache(clean)
        return getattr(patching, function)(model.inner, corrupt, cache, metric).numpy()


def ours(model: Model, part: str, by_position: bool) -> np.ndarray[Any, Any]:
    run = Run.corrupt(EQUAL)
    heads: list[int | None] = [None]
    if part in ("z", "q", "k", "v", "pattern"):
        heads = list(range(model.shape.n_kv_heads if part in ("k", "v") else model.shape.n_heads))
    places: list[str | int] = list(range(len(run.tokens[0]))) if by_position else ["all"]
    cells = [
        [Intervention(Site(layer, part, head=head), patch(), place)]
        for layer in range(model.shape.n_layers) for place in places for head in heads
    ]  # fmt: skip
    found = sweep(
        model, run, cells, metric=logit_difference(), sources={"source": RunSource.clean(EQUAL)}, engine="suffix",
        progress=lambda done, total: None,
    )  # fmt: skip
    sizes = [model.shape.n_layers, *([len(places)] if by_position else []), *([len(heads)] if heads != [None] else [])]
    return found.scores.reshape(len(run), *sizes)


@pytest.mark.parametrize(
    "name", ["own HookedTransformer", "hooked gpt2", "bridge gpt2", "hooked llama", "bridge llama", "hooked gpt_neox"]
)
@pytest.mark.parametrize(("function", "part", "by_position"), MAPS)
def test_maps_are_transformer_lens_maps(name: str, function: str, part: str, by_position: bool) -> None:
    model = models()[name]
    if part not in parts_of(model.inner):
        pytest.skip("the architecture has no such part")
    if part in ("q", "k") and "gpt2" not in name and "own" not in name:
        pytest.skip("TransformerLens patches queries and keys before rotation, these are those after it")
    if part == "resid_mid" and "bridge" in name:
        pytest.skip("on the bridge TransformerLens' resid_mid reaches the MLP and not the stream")
    mine = ours(model, part, by_position)
    for row in (0, 2):
        wanted = theirs(model, function, row)
        assert wanted.shape == mine[row].shape
        assert np.abs(mine[row] - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max()), (name, function)
        assert np.ptp(wanted) > 1e-2


def test_head_patching_is_the_normalised_map() -> None:
    model = subject("gpt2", "hooked")
    found = head_patching(model, EQUAL)
    wanted = theirs(model, "get_act_patch_attn_head_out_all_pos", 2)
    clean, corrupt = (float(found.values[side][2]) for side in ("clean", "corrupt"))
    assert np.allclose(found.data.values[2], (wanted - corrupt) / (clean - corrupt), atol=1e-5)
