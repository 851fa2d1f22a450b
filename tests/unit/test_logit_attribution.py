from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tiny

from mech_align import metrics
from mech_align.analyses.logit_attribution import logit_attribution
from mech_align.errors import BadAnswer, BadPrompts, MechAlignError, SelfCheckFailed, UnsupportedModel
from mech_align.models import Model, load_model
from mech_align.models.names import hooks_in_place
from mech_align.prompts import Pairs

FAMILIES = ("gpt2", "llama", "qwen3", "gpt_neox", "gemma2", "gemma3")
CLEAN = [[5, 9, 30, 41, 8], [7, 61, 22, 13, 40, 55, 21, 90], [3, 4, 77], [12, 88, 45, 6, 71, 33]]
CORRUPT = [[5, 9, 31, 41, 8], [7, 60, 22, 13, 40, 55, 21, 90], [3, 5, 77], [12, 45, 6, 71, 33]]
ANSWER, WRONG = [[5, 7], [6], [9], [3]], [[8], [10, 4], [11], [12]]
PAIRS = Pairs.from_tokens(CLEAN, CORRUPT, ANSWER, WRONG, group=["a", "a", "b", "b"])

Load = Callable[..., Model]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    kept: dict[Any, Model] = {}

    def get(family: str, backend: str = "hooked", **settings: Any) -> Model:
        key = (family, backend, *sorted(settings.items()))
        if key not in kept:
            folder = save_tiny(family, tmp_path_factory.mktemp(family), tokenizer=False)
            kept[key] = load_model(folder, backend=backend, **settings)
        return kept[key]

    return get


def by_hand(model: Model, prompts: list[list[int]], cap: float | None = None) -> np.ndarray:
    """The logit difference from the model's own logits, before the squashing."""
    logits = model.logits(prompts).double()
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    return np.array([float(row[a].mean() - row[w].mean()) for row, a, w in zip(logits, ANSWER, WRONG, strict=True)])


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_sum_to_the_logit_difference_of_the_model(load: Load, family: str, backend: str) -> None:
    model = load(family, backend)
    before = hooks_in_place(model.inner)
    found = logit_attribution(model, PAIRS)
    target = by_hand(model, CLEAN, 8.0 if family == "gemma2" else None)
    np.testing.assert_allclose(found.data.sum("component"), target, atol=1e-4)
    np.testing.assert_allclose(found.values["clean"], target, atol=1e-4)
    assert np.abs(found.values["residual"]).max() < 1e-5
    assert np.abs(found.data).max() > 0.05
    assert hooks_in_place(model.inner) == before
    assert found.provenance["checks"]["largest residual"] < 1e-5
    assert ("attributed" in found.provenance) == (family == "gemma2")


@pytest.mark.parametrize("family", FAMILIES)
def test_backends_agree_part_by_part(load: Load, family: str) -> None:
    hooked, bridge = (logit_attribution(load(family, backend), PAIRS) for backend in ("hooked", "bridge"))
    assert list(hooked.values["component"].values) == list(bridge.values["component"].values)
    np.testing.assert_allclose(hooked.data, bridge.data, atol=2e-5)


def test_labels_layers_and_kinds(load: Load) -> None:
    values = logit_attribution(load("gpt2"), PAIRS).values
    rows = list(zip(values["component"].values, values["layer"].values, values["kind"].values, strict=True))
    assert rows[:3] == [("embed", -1, "embed"), ("pos_embed", -1, "embed"), ("L0H0", 0, "head")]
    assert ("L2.attn bias", 2, "bias") in rows and ("L2.mlp", 2, "mlp") in rows
    assert rows[-1] == ("unembed bias", 3, "bias")
    assert sum(kind == "head" for *_, kind in rows) == 12
    # No position embedding and no biases: no such parts.
    assert {"pos_embed", "L0.attn bias", "unembed bias"}.isdisjoint(
        logit_attribution(load("llama"), PAIRS).values["component"].values
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_equal_those_of_transformer_lens(load: Load, family: str) -> None:
    model = load(family, weights="folded")
    found = logit_attribution(model, Pairs.from_tokens(CLEAN, CORRUPT, [a[0] for a in ANSWER], [w[0] for w in WRONG]))
    heads = found.data[:, found.values["kind"].values == "head"].values
    for i, prompt in enumerate(CLEAN):
        _, cache = model.inner.run_with_cache(torch.tensor([prompt]))
        stack = cache.stack_head_results(layer=-1, pos_slice=-1)
        theirs = cache.logit_attrs(stack, tokens=ANSWER[i][0], incorrect_tokens=WRONG[i][0], pos_slice=-1)
        np.testing.assert_allclose(heads[i], theirs[:, 0], atol=1e-5)


def test_folding_weights_moves_nothing_but_value_biases(load: Load) -> None:
    raw, folded = (logit_attribution(load("gpt2", weights=weights), PAIRS) for weights in ("raw", "folded"))

    def block(result: Any, layer: int) -> Any:
        kind, where = result.values["kind"].values, result.values["layer"].values
        return result.data[:, (where == layer) & np.isin(kind, ["head", "bias"])].sum("component").values

    for layer in range(3):
        np.testing.assert_allclose(block(raw, layer), block(folded, layer), atol=1e-4)
    for name in ("L0.mlp", "L2.mlp", "pos_embed"):
        np.testing.assert_allclose(raw.data.sel(component=name), folded.data.sel(component=name), atol=1e-4)


def test_one_head_by_hand(load: Load) -> None:
    """A head of a Gemma 2, whose attention is normalised again before it is added."""
    model = load("gemma2", "hooked")
    inner: Any = model.inner
    _, cache = inner.run_with_cache(torch.tensor([CLEAN[1]]))
    block = inner.blocks[1]
    write = cache["blocks.1.attn.hook_z"][0, -1, 2] @ block.attn.W_O[2]
    whole = (cache["blocks.1.attn.hook_z"][0, -1, :, :, None] * block.attn.W_O).sum((0, 1))
    write = write / (whole.pow(2).mean() + block.ln1_post.eps).sqrt() * block.ln1_post.w
    final = cache["blocks.2.hook_resid_post"][0, -1]
    write = write / (final.pow(2).mean() + inner.ln_final.eps).sqrt() * inner.ln_final.w
    expected = write @ (inner.W_U[:, 6] - inner.W_U[:, [10, 4]].mean(1))
    found = logit_attribution(model, PAIRS).data.sel(component="L1H2")[1]
    assert float(found) == pytest.approx(float(expected), abs=1e-5)


def test_corrupt_run_keeps_the_clean_answers(load: Load) -> None:
    model = load("llama")
    found = logit_attribution(model, PAIRS, run="corrupt", batch_size=1)
    np.testing.assert_allclose(found.data.sum("component"), by_hand(model, CORRUPT), atol=1e-4)
    assert "clean" not in found.values and "corrupt" in found.values
    np.testing.assert_allclose(found.data, logit_attribution(model, PAIRS, run="corrupt").data, atol=1e-5)


def test_mlp_bias_apart(load: Load) -> None:
    whole, split = (logit_attribution(load("gpt2"), PAIRS, split_mlp_bias=apart) for apart in (False, True))
    assert "L1.mlp bias" not in whole.values["component"]
    both = split.data.sel(component="L1.mlp") + split.data.sel(component="L1.mlp bias")
    np.testing.assert_allclose(both, whole.data.sel(component="L1.mlp"), atol=1e-5)
    assert np.abs(split.data.sel(component="L1.mlp bias")).max() > 1e-3


def test_half_precision_sums_within_rounding(load: Load) -> None:
    found = logit_attribution(load("llama", dtype="bfloat16"), PAIRS)
    assert np.abs(found.values["residual"]).max() < 0.2
    assert found.provenance["dtype"] == "bfloat16"


def test_statistics_and_saving(load: Load, tmp_path: Any) -> None:
    from mech_align.results import load_result

    found = logit_attribution(load("gpt2"), PAIRS)
    assert found.top(3)["site"].tolist()[0] in found.values["component"].values
    again = load_result(found.save(tmp_path / "dla"))
    np.testing.assert_array_equal(again.data.values, found.data.values)


def test_refuses_metrics_that_are_not_linear(load: Load) -> None:
    with pytest.raises(MechAlignError, match="does not split"):
        logit_attribution(load("gpt2"), PAIRS, metric=metrics.log_odds())


def test_refuses_architectures_that_it_cannot_take_apart(load: Load) -> None:
    with pytest.raises(UnsupportedModel, match="take"):
        logit_attribution(load("olmo2"), PAIRS)


def test_a_wrong_reading_of_the_weights_is_noticed(tmp_path: Any) -> None:
    model = load_model(save_tiny("llama", tmp_path, tokenizer=False), backend="hooked")
    decoder = model.decoder
    assert decoder is not None
    model.decoder = replace(decoder, embedding_scale=1.3)  # type: ignore[misc]
    with pytest.raises(SelfCheckFailed, match="do not sum"):
        logit_attribution(model, PAIRS)


def test_token_ids_of_another_vocabulary_are_refused(load: Load) -> None:
    with pytest.raises(BadAnswer, match="token id 500"):
        logit_attribution(load("gpt2"), Pairs.from_tokens(CLEAN, CORRUPT, ANSWER, [[500], [10], [11], [12]]))
    with pytest.raises(BadPrompts, match="token id 97"):
        logit_attribution(load("gpt2"), Pairs.from_tokens([[3, 97]], [[3, 4]], [[5]], [[6]]))
