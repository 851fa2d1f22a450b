"""The suffix engine computes only what an edit can change: counted, not timed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from contract.subjects import hooked, pairs, subject, worst

from mech_align.errors import PatchDidNotFire
from mech_align.interventions import Edit, Intervention, patch, zero
from mech_align.metrics import logit_difference
from mech_align.models import wrap_model
from mech_align.models.decoder import DecoderLayer
from mech_align.sites import Site
from mech_align.sweeps import Run, RunSource, sweep
from mech_align.sweeps.batch import Batch
from mech_align.sweeps.suffix import SuffixEngine, _Window

PAIRS = pairs()
RUN = Run.corrupt(PAIRS)


def batch(plan: Any, name: str = "llama") -> Batch:
    made = {"source": RunSource.clean(PAIRS)}
    return Batch(subject(name, "hooked"), RUN, list(range(len(RUN))), plan, logit_difference(), made, "suffix")


def rows_seen(plan: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of the stream enter attention's and the MLP's products while cells run."""
    ready = batch(plan)
    seen: list[int] = []
    real = DecoderLayer.qkv
    monkeypatch.setattr(
        DecoderLayer,
        "qkv",
        lambda self, x, positions: (seen.append(x.shape[0] * x.shape[1]), real(self, x, positions))[1],
    )
    for chunk in ready.chunks(10**6):
        ready.run(chunk)
    return seen


def test_only_layers_above_and_positions_after_an_edit_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        last = rows_seen([[Intervention(Site(0, "z", head=1), patch(), "last")]], monkeypatch)
        assert last == [len(RUN)] * 2, "two layers above, one row a prompt"
        top = rows_seen([[Intervention(Site(2, "z", head=h), patch())] for h in range(4)], monkeypatch)
        assert top == [], "the last layer's attention is not run again"
        low = rows_seen([[Intervention(Site(0, "resid_pre"), zero(), 0)]], monkeypatch)
        width = max(map(len, RUN.tokens))
        assert low == [len(RUN) * width] * 3


def test_an_edit_that_is_not_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        ready = batch([[Intervention(Site(0, "z", head=1), patch()), Intervention(Site(1, "mlp_out"), zero())]])
        real = _Window._edited
        monkeypatch.setattr(
            _Window, "_edited", lambda self, i, part, value: value if part == "mlp_out" else real(self, i, part, value)
        )
        with pytest.raises(PatchDidNotFire, match="mlp_out"):
            ready.run([0])


def test_edits_see_pure_values_and_do_not_leak_into_other_cells() -> None:
    model = subject("gpt2", "hooked")
    kept: list[torch.Tensor] = []

    def spy(value: torch.Tensor, _: Any) -> torch.Tensor:
        kept.append(value.clone())
        return value * 0 + 7

    site = Site(1, "attn_out")
    both = [[Intervention(site, Edit("spy", spy))], [Intervention(site, Edit("same", lambda value, _: value))]]
    found = sweep(model, RUN, both, metric=logit_difference(), engine="suffix", progress=lambda *_: None)
    assert worst(found.scores[:, 1], found.baseline).max() <= 1e-5
    assert np.abs(found.scores[:, 0] - found.baseline).max() > 1e-2
    assert kept and all(not bool((value == 7).all()) for value in kept)


def test_keys_that_are_ungrouped_by_the_user() -> None:
    model = wrap_model(hooked(n_key_value_heads=2, ungroup_grouped_query_attention=True))
    assert model.shape.n_kv_heads == 4 and model.decoder is not None
    plan = [[Intervention(Site(1, part, head=head), patch())] for part in ("k", "v") for head in range(4)]
    how: Any = {
        "metric": logit_difference(),
        "sources": {"source": RunSource.clean(PAIRS)},
        "progress": lambda *_: None,
    }
    fast, full = (sweep(model, RUN, plan, engine=engine, **how) for engine in ("suffix", "full"))
    assert worst(fast.scores, full.scores).max() <= 2e-5


def test_a_decoder_is_used_as_it_is_read() -> None:
    decoder = subject("llama", "hooked").decoder
    assert decoder is not None
    ids = torch.tensor([[3, 4, 5]])
    engine = SuffixEngine(decoder, ids, torch.tensor([2]), {}, lambda resid: decoder.readout(resid)[..., 7])
    scaled = replace(decoder, unembedding=decoder.unembedding * 2)
    twice = SuffixEngine(scaled, ids, torch.tensor([2]), {}, lambda resid: scaled.readout(resid)[..., 7])
    assert torch.allclose(2 * engine.baseline(), twice.baseline())
