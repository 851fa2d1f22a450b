from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tiny

from mech_align import metrics
from mech_align.analyses.attribution_patching import PARTS, attribution_patching
from mech_align.errors import BadPrompts, MechAlignError, UndefinedEffect, UnknownSite
from mech_align.interventions import Intervention, patch
from mech_align.models import Hook, Model, Tokens, load_model
from mech_align.models.names import hooks_in_place
from mech_align.prompts import Pairs
from mech_align.sites import Site
from mech_align.sweeps import SweepOptions, patch_effects

CLEAN = [[5, 9, 30, 41, 8], [7, 61, 22, 13, 40, 55, 21, 90], [3, 4, 77], [12, 88, 45, 6, 71, 33], [12, 88, 45, 6]]
CORRUPT = [[5, 9, 31, 42, 8], [7, 60, 22, 13, 40, 55, 21, 90], [3, 5, 77], [12, 70, 71, 45, 6, 71, 33], [14, 45, 6]]
ANSWER, WRONG = [[5, 7], [6], [9], [3], [20]], [[8], [10, 4], [11], [12], [21]]
PAIRS = Pairs.from_tokens(CLEAN, CORRUPT, ANSWER, WRONG, group=["a", "a", "b", "b", "b"])
TOKENS = PAIRS.encode(None)
NONE = {"confirm": 0, "sample": 0}

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


def difference(logits: torch.Tensor, row: int) -> float:
    return float(logits[0, ANSWER[row]].mean() - logits[0, WRONG[row]].mean())


def slope_by_hand(model: Model, row: int, layer: int, part: str, unit: int | None, share: float = 2e-3) -> float:
    """Effect of moving one unit a small share of the way to its clean value, at aligned positions, over that share."""
    corrupt, clean = (Tokens.from_lists([rows[row]]) for rows in (CORRUPT, CLEAN))
    key = (layer, part)
    ours, theirs = model.capture(corrupt, [key])[key], model.capture(clean, [key])[key]
    where = TOKENS.source_position[row]
    at = np.flatnonzero(where >= 0)
    target = ours.clone()
    target[:, at] = theirs[:, where[at]]
    pick = (slice(None), slice(None), *(() if unit is None else (unit,)))

    def nudged(step: float) -> float:
        def nudge(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[pick] = value[pick] + step * (target - ours)[pick]
            return value

        logits = model.run(corrupt, [Hook(layer, part, nudge)])
        assert logits is not None
        return difference(logits, row)

    return (nudged(share) - nudged(-share)) / (2 * share)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gpt_neox", "gemma3"])
def test_scores_are_the_slope_of_the_exact_patch(load: Load, family: str, backend: str) -> None:
    model = load(family, backend, dtype="float64")
    for part, unit in {"heads": 3, "attn": None, "mlp": None, "neurons": 40}.items():
        found = attribution_patching(model, PAIRS, part=part, min_gap=1e-9, **NONE)
        gap = (found.values["clean"] - found.values["corrupt"]).values
        for row in (1, 3, 4):  # equal lengths, a longer and a shorter corrupt prompt
            for layer in (0, 2):
                score = float(found.data.values[(row, layer) if unit is None else (row, layer, unit)]) * gap[row]
                expected = slope_by_hand(model, row, layer, PARTS[part], unit)
                assert score == pytest.approx(expected, rel=5e-3, abs=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2"])
@pytest.mark.parametrize("steps", [1, 3])
def test_backends_agree(load: Load, family: str, steps: int) -> None:
    hooked, bridge = (
        attribution_patching(load(family, backend), PAIRS, steps=steps, **NONE) for backend in ("hooked", "bridge")
    )
    assert hooked.data.dims == ("prompt", "layer", "head")
    assert hooked.data.shape == (5, 3, 4)  # query heads, also where keys and values are grouped
    np.testing.assert_allclose(hooked.data, bridge.data, rtol=1e-3, atol=1e-4)
    assert np.nanmax(np.abs(hooked.data)) > 1e-3


@pytest.mark.parametrize("part", ["heads", "neurons"])
def test_many_steps_sum_to_the_effect_of_the_whole_layer(load: Load, part: str) -> None:
    """Completeness of integrated gradients: what one step gets wrong, many get right."""
    model = load("llama", "hooked")
    cells = [[Intervention(Site(layer, PARTS[part]), patch())] for layer in range(3)]
    exact = patch_effects(model, TOKENS, cells, metric=metrics.logit_difference()).effect

    def error(steps: int) -> float:
        found = attribution_patching(model, PAIRS, part=part, steps=steps, **NONE)
        return float(np.nanmax(np.abs(found.data.sum(found.data.dims[2]).values - exact)))

    assert error(40) < 1e-2
    assert error(1) > 10 * error(40)


def test_path_of_the_inputs_averages_gradients_of_mixed_runs(load: Load) -> None:
    model = load("llama")
    rows = [0, 1, 2]
    found = attribution_patching(model, PAIRS.take(rows), steps=2, path="inputs", **NONE)
    gap = (found.values["clean"] - found.values["corrupt"]).values
    for row in rows:
        corrupt, clean = (Tokens.from_lists([side[row]]) for side in (CORRUPT, CLEAN))
        keys = [(0, "resid_pre"), (1, "z")]
        ours, theirs = model.capture(corrupt, keys), model.capture(clean, keys)
        total = torch.zeros(4)
        for share in (0.25, 0.75):
            mixed = ours[keys[0]] + share * (theirs[keys[0]] - ours[keys[0]])
            _, slope, _ = model.gradients(
                corrupt,
                [keys[1]],
                lambda x, row=row: x[:, ANSWER[row]].mean(-1) - x[:, WRONG[row]].mean(-1),
                hooks=[Hook(0, "resid_pre", lambda value, mixed=mixed: mixed)],
            )
            total += ((theirs[keys[1]] - ours[keys[1]]) * slope[keys[1]]).sum((0, 1, 3)) / 2
        np.testing.assert_allclose(found.data.values[row, 1] * gap[row], total, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_confirmation_is_exact_patching_of_the_top_and_of_a_sample(load: Load, backend: str) -> None:
    model = load("gpt2", backend)
    found = attribution_patching(model, PAIRS, confirm=3, sample=4)
    kind, exact = found.values["confirmed"].values, found.values["exact"].values
    assert [int((kind == name).sum()) for name in ("top", "sample", "no")] == [3, 4, 5]
    np.testing.assert_array_equal(np.isfinite(exact), kind != "no")
    score = np.abs(np.nanmean(found.data.values, 0))
    assert score[kind == "top"].min() >= score[kind != "top"].max()
    sites = [str(site) for site in found.values["cell"].values]
    cells = [[Intervention(Site.parse(site), patch())] for site in sites]
    full = SweepOptions(engine="full")
    by_hand = patch_effects(model, TOKENS, cells, metric=metrics.logit_difference(), options=full)
    np.testing.assert_allclose(found.values["exact_by_prompt"], by_hand.effect, atol=1e-4)
    for number, site in enumerate(map(Site.parse, sites)):
        assert exact[site.layer, site.head] == pytest.approx(np.nanmean(by_hand.effect[:, number]), abs=1e-4)
    report = found.provenance["screen"]
    assert (report["confirmed"], report["sampled"], report["cells"]) == (3, 4, 12)
    low, high = report["miss_rate_interval"]
    assert low <= report["miss_rate"] <= high
    assert -1 <= report["spearman_both"] <= 1
    assert "first-order" in found.unit
    again = attribution_patching(model, PAIRS, confirm=3, sample=4)
    np.testing.assert_array_equal(again.values["confirmed"].values, kind)
    other = attribution_patching(model, PAIRS, confirm=3, sample=4, options=SweepOptions(seed=5))
    assert (other.values["confirmed"].values != kind).any()


def test_miss_rate_without_a_sample_and_without_a_rest(load: Load) -> None:
    model = load("gpt2")
    blind = attribution_patching(model, PAIRS, confirm=3, sample=0)
    assert blind.provenance["screen"]["miss_rate"] is None
    assert any("unknown" in warning for warning in blind.warnings)
    all_of_them = attribution_patching(model, PAIRS, confirm=50)
    assert all_of_them.provenance["screen"]["miss_rate"] == 0
    assert np.isfinite(all_of_them.values["exact"]).all()
    none = attribution_patching(model, PAIRS, threshold=0.5, **NONE)
    assert none.provenance["screen"]["threshold"] == 0.5
    assert np.isnan(none.values["exact"]).all()


def test_positions_layers_and_direction(load: Load) -> None:
    model = load("llama")
    everywhere, last, differs = (
        attribution_patching(model, PAIRS.take([0, 1, 2]), positions=where, **NONE).data.values
        for where in ("all", "last", "differs")
    )
    # In the top layer only the last position's z can reach the metric.
    np.testing.assert_allclose(everywhere[:, 2], last[:, 2], atol=1e-6)
    assert np.abs(everywhere[:, 0] - last[:, 0]).max() > 1e-4
    assert np.abs(differs[:, 2]).max() < 1e-7
    some = attribution_patching(model, PAIRS.take([0, 1, 2]), layers="2", **NONE)
    assert some.values["layer"].values.tolist() == [2]
    np.testing.assert_allclose(some.data[:, 0], everywhere[:, 2], atol=1e-6)
    noise = attribution_patching(model, PAIRS, direction="noise", confirm=2, sample=2)
    denoise = attribution_patching(model, PAIRS.swapped(), confirm=2, sample=2)
    # Swapped pairs: clean and corrupt runs change places, and so does the sign of the metric and of the gap.
    np.testing.assert_allclose(noise.data, -denoise.data, rtol=1e-3, atol=1e-5)


def test_mlps_and_neurons_belong_together(load: Load) -> None:
    """The MLP's output is linear in its neurons: their scores sum to its score."""
    model = load("gpt2")
    whole = attribution_patching(model, PAIRS, part="mlp", **NONE)
    neurons = attribution_patching(model, PAIRS, part="neurons", confirm=3, sample=3)
    assert whole.data.dims == ("prompt", "layer") and neurons.data.dims == ("prompt", "layer", "neuron")
    np.testing.assert_allclose(neurons.data.sum("neuron", skipna=False), whole.data, rtol=1e-3, atol=1e-4)
    assert str(neurons.values["cell"].values[0]).startswith("L")
    heads, attention = (attribution_patching(model, PAIRS, part=part, **NONE) for part in ("heads", "attn"))
    np.testing.assert_allclose(heads.data.sum("head", skipna=False), attention.data, rtol=1e-3, atol=1e-4)


def test_batches_grad_modes_and_hooks_do_not_matter(load: Load) -> None:
    model = load("qwen3", "bridge")
    before = hooks_in_place(model.inner)
    whole = attribution_patching(model, PAIRS, steps=2, **NONE)
    single = attribution_patching(model, PAIRS, steps=2, options=SweepOptions(batch_size=1), **NONE)
    np.testing.assert_allclose(whole.data, single.data, rtol=1e-3, atol=1e-5)
    with torch.inference_mode():
        inside = attribution_patching(model, PAIRS, steps=2, **NONE)
    np.testing.assert_allclose(whole.data, inside.data, atol=1e-6)
    assert hooks_in_place(model.inner) == before
    assert all(parameter.grad is None for parameter in model.inner.parameters())


def test_pairs_without_a_gap_are_counted_and_unmeasured(load: Load) -> None:
    pairs = Pairs.from_tokens([*CLEAN[:3], CLEAN[0]], [*CORRUPT[:3], CLEAN[0]], [*ANSWER[:3], [5]], [*WRONG[:3], [8]])
    found = attribution_patching(load("gpt2"), pairs, confirm=2, sample=2)
    assert found.values["degenerate"].values.tolist() == [False, False, False, True]
    assert np.isnan(found.data[3]).all() and np.isfinite(found.data[:3]).all()
    assert np.isfinite(found.values["exact"]).sum() == 4
    with pytest.raises(UndefinedEffect):
        attribution_patching(load("gpt2"), pairs.take([3]))


def test_refusals(load: Load) -> None:
    model = load("gpt2")
    for wrong in ({"part": "resid"}, {"steps": 0}, {"confirm": -1}, {"path": "curved"}):
        with pytest.raises(MechAlignError):
            attribution_patching(model, PAIRS, **wrong)
    with pytest.raises(BadPrompts, match="subject"):
        attribution_patching(model, PAIRS, positions="subject")
    with pytest.raises(UnknownSite):
        attribution_patching(model, PAIRS, layers="9")


def test_saved_and_averaged(load: Load, tmp_path: Any) -> None:
    from mech_align.results import load_result

    found = attribution_patching(load("gpt2"), PAIRS, confirm=2, sample=2)
    again = load_result(found.save(tmp_path / "screen"))
    np.testing.assert_array_equal(again.values["exact"].values, found.values["exact"].values)
    assert again.provenance["screen"] == found.provenance["screen"]
    assert found.top(2)["site"].iloc[0].startswith("L")
