from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tiny

from mech_align import metrics
from mech_align.analyses.logit_lens import logit_lens
from mech_align.errors import BadPrompts, MechAlignError, UnknownSite
from mech_align.interventions import Intervention, add, patch, project_out, zero
from mech_align.models import Hook, Model, Tokens, load_model
from mech_align.models.names import hooks_in_place
from mech_align.prompts import Pairs
from mech_align.sites import Site
from mech_align.sweeps import MeanSource

FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "gemma3", "olmo2")
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


def odds(logits: torch.Tensor) -> np.ndarray:
    sets = zip(logits.double(), ANSWER, WRONG, strict=True)
    return np.array([float(row[a].logsumexp(0) - row[w].logsumexp(0)) for row, a, w in sets])


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_top_of_the_lens_is_the_model(load: Load, family: str, backend: str) -> None:
    model = load(family, backend)
    found = logit_lens(model, PAIRS)
    logits = model.logits(CLEAN)
    assert found.data.dims == ("prompt", "layer")
    assert found.values["layer"].values.tolist() == [-1, 0, 1, 2]
    assert found.values["label"].values[0] == "embed"
    np.testing.assert_allclose(found.data[:, -1], odds(logits), atol=1e-4)
    np.testing.assert_allclose(found.values["output"], odds(logits), atol=1e-4)
    for i, row in enumerate(logits):
        best = max(ANSWER[i], key=lambda token: float(row[token]))
        assert int(found.values["rank"][i, -1]) == 1 + int((row > row[best]).sum())
        assert float(found.values["probability"][i, -1]) == pytest.approx(float(row.softmax(-1)[best]), abs=1e-5)
    assert found.provenance["engine"] == ("hooks" if family == "olmo2" else "decoder")
    assert found.provenance["checks"]["last layer - model"] < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_every_layer_by_hand(load: Load, family: str) -> None:
    model = load(family)
    inner: Any = model.inner
    found = logit_lens(model, PAIRS)
    for i, prompt in enumerate(CLEAN):
        _, cache = inner.run_with_cache(torch.tensor([prompt]))
        streams = [cache["blocks.0.hook_resid_pre"], *(cache[f"blocks.{n}.hook_resid_post"] for n in range(3))]
        for layer, stream in enumerate(streams):
            logits = inner.unembed(inner.ln_final(stream))[0, -1]
            logits = 8.0 * torch.tanh(logits / 8.0) if family == "gemma2" else logits
            expected = logits[ANSWER[i]].logsumexp(0) - logits[WRONG[i]].logsumexp(0)
            assert float(found.data[i, layer]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_lens_through_the_model_equals_lens_from_the_weights(load: Load, backend: str, tmp_path: Any) -> None:
    whole = logit_lens(load("gpt_neox", backend), PAIRS)
    blind = load_model(save_tiny("gpt_neox", tmp_path, tokenizer=False), backend=backend)
    blind.decoder = None  # type: ignore[misc]
    other = logit_lens(blind, PAIRS)
    assert (whole.provenance["engine"], other.provenance["engine"]) == ("decoder", "hooks")
    for name in ("effect", "rank", "probability"):
        np.testing.assert_allclose(whole.values[name], other.values[name], atol=1e-4)


def test_a_wrong_reading_of_the_weights_is_noticed_and_not_used(load: Load, tmp_path: Any) -> None:
    model = load_model(save_tiny("llama", tmp_path, tokenizer=False), backend="hooked")
    assert model.decoder is not None
    model.decoder = replace(model.decoder, softcap=1.0)  # type: ignore[misc]
    found = logit_lens(model, PAIRS, batch_size=2)
    np.testing.assert_allclose(found.data, logit_lens(load("llama"), PAIRS).data, atol=1e-4)
    assert any("through the model itself" in warning for warning in found.warnings)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "olmo2"])
def test_interventions_act_from_their_layer_on(load: Load, family: str, backend: str) -> None:
    model = load(family, backend)
    before = hooks_in_place(model.inner)
    vector = torch.linspace(-1, 1, 32)
    found = logit_lens(
        model,
        PAIRS,
        interventions={
            "head": [Intervention(Site(1, "z", head=2), zero())],
            "both": [
                Intervention(Site(0, "resid_post"), project_out(vector)),
                Intervention(Site(2, "mlp_out"), add(vector)),
            ],
        },
    )
    assert found.data.dims == ("prompt", "intervention", "layer")
    assert found.values["intervention"].values.tolist() == ["none", "head", "both"]
    np.testing.assert_allclose(found.data.sel(intervention="none"), logit_lens(model, PAIRS).data, atol=1e-5)
    undone = found.data.sel(intervention="head") - found.data.sel(intervention="none")
    assert np.abs(undone.sel(layer=[-1, 0])).max() < 1e-5
    assert np.abs(undone.sel(layer=[1, 2])).min() > 1e-5

    def silence(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, :, 2] = 0
        return value

    logits = model.run(Tokens.from_lists(CLEAN), [Hook(1, "z", silence)])
    assert logits is not None
    np.testing.assert_allclose(found.data.sel(intervention="head", layer=2), odds(logits), atol=1e-4)
    assert hooks_in_place(model.inner) == before


def test_patch_from_the_other_run_and_from_a_mean(load: Load) -> None:
    model = load("llama")
    equal = PAIRS.take([0, 1, 2])  # pairs of equal length: the whole stream can be put in
    whole = {"whole": [Intervention(Site(0, "resid_pre"), patch())]}
    found = logit_lens(model, equal, run="corrupt", interventions=whole)
    clean = logit_lens(model, equal, run="clean")
    np.testing.assert_allclose(found.data.sel(intervention="whole"), clean.data, atol=1e-5)
    assert np.abs(found.data.sel(intervention="none", layer=2) - clean.data.sel(layer=2)).max() > 1e-3
    cell = [Intervention(Site(1, "mlp_out"), patch(), source="zeros")]
    mean = logit_lens(
        model, equal, interventions={"mean": cell}, sources={"zeros": MeanSource({(1, "mlp_out"): torch.zeros(32)})}
    )
    gone = logit_lens(model, equal, interventions={"mean": [Intervention(Site(1, "mlp_out"), zero())]})
    np.testing.assert_allclose(mean.data, gone.data, atol=1e-5)


@pytest.mark.parametrize("part", ["resid_pre", "resid_mid"])
def test_other_places_in_the_stream(load: Load, part: str) -> None:
    model = load("llama")
    found = logit_lens(model, PAIRS, part=part)
    assert found.values["layer"].values.tolist() == [0, 1, 2]
    after = logit_lens(model, PAIRS).data
    if part == "resid_pre":
        np.testing.assert_allclose(found.data.values, after.values[:, :-1], atol=1e-5)
    else:
        assert np.abs(found.data.values - after.values[:, 1:]).min() > 1e-5


def test_metrics_of_the_whole_vocabulary_and_batches(load: Load) -> None:
    model = load("gemma2")
    found = logit_lens(model, PAIRS, metric=metrics.probability(), batch_size=1)
    logits = model.logits(CLEAN)
    expected = [float(row.softmax(-1)[a].sum()) for row, a in zip(logits, ANSWER, strict=True)]
    np.testing.assert_allclose(found.data[:, -1], expected, atol=1e-5)
    np.testing.assert_allclose(found.data, logit_lens(model, PAIRS, metric=metrics.probability()).data, atol=1e-5)


def test_half_precision(load: Load) -> None:
    found = logit_lens(load("llama", dtype="bfloat16"), PAIRS)
    assert np.isfinite(found.data).all()
    np.testing.assert_allclose(found.data, logit_lens(load("llama"), PAIRS).data, atol=0.3)


def test_refusals(load: Load) -> None:
    model = load("gpt2")

    def lens(cell: list[Intervention], name: str = "x", **more: Any) -> None:
        logit_lens(model, PAIRS, interventions={name: cell}, **more)

    head = Intervention(Site(1, "z", head=2), zero())
    with pytest.raises(MechAlignError, match="does not read z"):
        logit_lens(model, PAIRS, part="z")
    with pytest.raises(MechAlignError, match="undisturbed"):
        lens([head], "none")
    with pytest.raises(MechAlignError, match="changes nothing"):
        lens([])
    with pytest.raises(UnknownSite, match="L1H9"):
        lens([Intervention(Site(1, "z", head=9), zero())])
    with pytest.raises(UnknownSite):
        lens([Intervention(Site(7, "mlp_out"), zero())])
    with pytest.raises(BadPrompts, match="subject"):
        lens([Intervention(Site(1, "z", head=2), zero(), "subject")])
    with pytest.raises(MechAlignError, match="no source named 'base'"):
        lens([Intervention(Site(1, "z", head=2), patch(), source="base")])
    with pytest.raises(UnknownSite):
        logit_lens(load("gpt_neox"), PAIRS, part="resid_mid")
