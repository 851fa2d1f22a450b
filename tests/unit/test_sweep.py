"""What a sweep promises beside its numbers: checks that can fail, resume, memory, errors, effects of a known truth."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import torch
from contract.subjects import cells, fresh, hooked, pairs, sources, subject, worst

from mech_align.analyses.causal_tracing import causal_tracing
from mech_align.analyses.head_patching import head_patching
from mech_align.analyses.mean_ablation import mean_ablation
from mech_align.analyses.neuron_patching import neuron_patching
from mech_align.errors import BadPrompts, BadRun, OutOfMemory, SelfCheckFailed, UndefinedEffect, UnknownSite
from mech_align.interventions import Edit, Intervention, add, patch, zero
from mech_align.metrics import Metric, logit_difference
from mech_align.models import Model, wrap_model
from mech_align.prompts import Pairs
from mech_align.sites import Site
from mech_align.sweeps import MeanSource, Run, RunSource, SweepOptions, encode, estimate, patch_effects, sweep
from mech_align.sweeps.batch import Batch
from mech_align.sweeps.full import FullEngine
from mech_align.sweeps.store import ScoreStore
from mech_align.sweeps.suffix import SuffixEngine

PAIRS = pairs()
RUN, SOURCE = Run.corrupt(PAIRS), {"source": RunSource.clean(PAIRS)}
HEADS = [[Intervention(Site(layer, "z", head=head), patch())] for layer in range(3) for head in range(4)]


def quiet(done: int, total: int) -> None:
    """No progress bar."""


QUIET = SweepOptions(progress=quiet)


def measured(model: Model, plan: Any = HEADS, **how: Any) -> Any:
    settings = {"metric": logit_difference(), "sources": SOURCE, "progress": quiet, **how}
    return sweep(model, RUN, plan, **settings)


# ---------------------------------------------------------------- planted truths


def planted_pairs() -> Pairs:
    return Pairs.from_tokens([planted.CLEAN], [planted.CORRUPT], [[3]], [[4]])


@pytest.mark.parametrize("engine", ["suffix", "full"])
def test_the_one_head_that_copies_is_found_and_no_other(engine: Any) -> None:
    model = wrap_model(planted.planted())
    options = replace(QUIET, engine=engine)
    for positions in ("all", "last"):
        found = head_patching(model, planted_pairs(), positions=positions, options=options)
        wanted = np.zeros((1, planted.N_LAYERS, planted.N_HEADS), np.float32)
        wanted[0, planted.LAYER, planted.HEAD] = 1
        assert np.array_equal(found.data.values, wanted), "exactly"
        assert found.provenance["engine"] == engine
    by_position = head_patching(model, planted_pairs(), positions="each", options=options)
    assert by_position.data.dims == ("prompt", "layer", "head", "position")
    assert float(by_position.data[0, planted.LAYER, planted.HEAD, -1]) == 1 == float(by_position.data.sum())
    backwards = head_patching(model, planted_pairs(), direction="noise", options=options)
    assert float(backwards.data[0, planted.LAYER, planted.HEAD]) == -1 == float(backwards.data.sum())
    for part, where in (("pattern", None), ("v", (planted.LAYER, planted.HEAD)), ("q", None), ("k", None)):
        inner = head_patching(model, planted_pairs(), part=part, options=options)
        assert float(inner.data.sum()) == (where is not None) and (where is None or float(inner.data[0][where]) == 1)


@pytest.mark.parametrize("engine", ["suffix", "full"])
def test_the_path_of_the_planted_head_is_traced(engine: Any) -> None:
    found = causal_tracing(wrap_model(planted.planted()), planted_pairs(), options=replace(QUIET, engine=engine))
    stream = found.data.sel(part="resid_post").values[0]
    wanted = np.zeros((planted.N_LAYERS, 4), np.float32)
    wanted[: planted.LAYER, planted.SUBJECT] = 1  # before the head reads it
    wanted[planted.LAYER :, -1] = 1  # after it has written
    assert np.array_equal(stream, wanted)
    blocks = found.data.sel(part="attn_out").values[0]
    assert blocks[planted.LAYER, -1] == 1 == blocks.sum() and not found.data.sel(part="mlp_out").values.any()


@pytest.mark.parametrize("engine", ["suffix", "full"])
def test_the_planted_neuron_is_found(engine: Any) -> None:
    model = wrap_model(planted.planted(by_neuron=True))
    options = replace(QUIET, engine=engine)
    found = neuron_patching(model, planted_pairs(), options=options)
    assert float(found.data[0, planted.LAYER, planted.NEURON]) == 1 == float(found.data.sum())
    sets = {"with": [Site(1, "mlp_post", neuron=n) for n in (2, 5)], "without": [Site(1, "mlp_post", neuron=4)]}
    both = neuron_patching(model, planted_pairs(), sets=sets, options=options)
    assert both.data.values.tolist() == [[1, 0]]
    with pytest.raises(UnknownSite):
        neuron_patching(model, planted_pairs(), sets={"none": []}, options=options)


@pytest.mark.parametrize(("mode", "effect"), [("zero", 1.0), ("mean", 1.0), ("resample", 2.0)])
def test_ablating_the_planted_head_against_controls(mode: Any, effect: float) -> None:
    """Alone in the corrupt run the head writes the wrong answer (-1): without it 0, with the mean of both runs 0."""
    found = mean_ablation(
        wrap_model(planted.planted()), planted_pairs(), "L1H2,L0H1", mode=mode, controls=5, resample_draws=1,
        positions="last", options=QUIET,
    )  # fmt: skip
    table = {
        str(cell): float(value) for cell, value in zip(found.values["cell"].values, found.data.values[0], strict=True)
    }
    kinds = dict(zip(map(str, found.values["cell"].values), found.values["kind"].values, strict=True))
    assert table["L1H2"] == table["L1H2+L0H1"] == effect and table["L0H1"] == 0
    controls = [value for name, value in table.items() if kinds[name].startswith("control")]
    assert len(controls) >= 10 and not any(controls)
    ranked = mean_ablation(wrap_model(planted.planted()), planted_pairs(), "L1H2", controls=0, greedy=2, options=QUIET)
    assert "greedy 1: L1H2" in ranked.values["cell"].values.tolist()


# ---------------------------------------------------------------- self-checks that can fail


def _break(model: Model, **changes: Any) -> None:
    decoder = model.decoder
    assert decoder is not None
    layers = list(decoder.layers)
    layers[1] = replace(layers[1], **changes)
    model.__dict__["decoder"] = replace(decoder, layers=tuple(layers))


@pytest.mark.parametrize("what", ["scale", "bias", "window", "parallel"])
def test_a_wrong_decoder_is_refused_or_left(what: str) -> None:
    model = fresh("gpt2", "hooked")
    layer = model.decoder.layers[1]  # type: ignore[union-attr]
    changes: dict[str, Any] = {
        "scale": {"scale": layer.scale * 1.3},
        "bias": {"output": replace(layer.output, bias=None)},
        "window": {"window": 2},
        "parallel": {"parallel": True},
    }[what]
    _break(model, **changes)
    plan = [[Intervention(Site(0, "z", head=1), patch())], [Intervention(Site(0, "mlp_out"), zero())]]
    with pytest.raises(SelfCheckFailed, match="does not reproduce"):
        measured(model, plan, engine="suffix")
    found = measured(model, plan, engine="auto")
    assert found.engine == "full" and any("suffix engine refused" in text for text in found.warnings)
    wanted = measured(subject("gpt2", "hooked"), plan, engine="full")
    assert worst(found.scores, wanted.scores).max() <= 1e-5 and worst(found.baseline, wanted.baseline).max() <= 1e-5
    result = head_patching(model, PAIRS, layers=[0], options=QUIET)
    assert any("suffix engine refused" in text for text in result.warnings) and result.provenance["engine"] == "full"


def test_a_baseline_alone_is_checked_too() -> None:
    model = fresh("gpt2", "hooked")
    _break(model, scale=0.01)
    with pytest.raises(SelfCheckFailed):
        measured(model, [], engine="suffix")


def test_large_logits_are_not_taken_for_a_wrong_engine() -> None:
    inner = hooked()
    inner.unembed.b_U.data += 2000.0
    found = measured(wrap_model(inner), engine="suffix")
    assert found.engine == "suffix" and np.abs(found.scores).max() < 200


def test_hooks_left_behind_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("gpt2", "hooked")
    real = FullEngine.run

    def leaky(self: FullEngine, plan: Any) -> Any:
        model.inner.blocks[0].hook_resid_pre.add_hook(lambda value, hook: None)
        return real(self, plan)

    monkeypatch.setattr(FullEngine, "run", leaky)
    with pytest.raises(SelfCheckFailed, match="left behind"):
        measured(model, engine="full")


def test_hooks_are_gone_after_an_error_and_the_users_stay() -> None:
    model = fresh("gpt2", "hooked")
    seen: list[int] = []
    model.inner.blocks[0].hook_resid_pre.add_hook(lambda value, hook: seen.append(1))
    before = sum(len(point.fwd_hooks) for point in model.inner.hook_dict.values())

    def boom(value: torch.Tensor, source: Any) -> torch.Tensor:
        raise ZeroDivisionError

    for engine in ("full", "suffix"):
        with pytest.raises(ZeroDivisionError):
            measured(model, [[Intervention(Site(1, "mlp_out"), Edit("boom", boom))]], engine=engine)
    measured(model, engine="full")
    assert sum(len(point.fwd_hooks) for point in model.inner.hook_dict.values()) == before == 1 and seen


def test_scores_that_overflow_are_not_handed_on() -> None:
    plan = [[Intervention(Site(1, "resid_post"), Edit("blow up", lambda value, _: value * torch.inf))]]
    with pytest.raises(SelfCheckFailed, match="finite|reproduce"):
        measured(fresh("gpt2", "hooked"), plan)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("engine", ["suffix", "full"])
@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_memory_that_runs_out_halves_the_batch(
    engine: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subject("llama", "hooked")
    wanted = measured(model, engine=engine)
    real, fails = Batch.run, {"left": 9}

    def tight(self: Batch, members: Any) -> Any:
        if len(self.rows) > 2 and fails["left"]:
            fails["left"] -= 1
            raise error
        return real(self, members)

    monkeypatch.setattr(Batch, "run", tight)
    seen: list[int] = []
    found = measured(model, engine=engine, progress=lambda done, total: seen.append(done))
    assert worst(found.scores, wanted.scores).max() <= 1e-5 and worst(found.baseline, wanted.baseline).max() <= 1e-5
    assert any("memory ran out" in text for text in found.warnings) and not wanted.warnings
    assert seen == sorted(seen) and seen[-1] == len(RUN) * len(HEADS), "nothing is counted twice"


def test_a_check_that_ran_out_of_memory_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fails = Batch.full_error, {"left": 1}

    def tight(self: Batch, cell: int | None, row: int) -> float:
        if fails["left"]:
            fails["left"] -= 1
            raise MemoryError
        return real(self, cell, row)

    monkeypatch.setattr(Batch, "full_error", tight)
    assert "random cell - full forward" in measured(subject("llama", "hooked")).checks


def test_no_room_for_one_prompt_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Batch, members: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB")

    monkeypatch.setattr(Batch, "run", none)
    with pytest.raises(OutOfMemory, match="not even one prompt"):
        measured(subject("llama", "hooked"))


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Batch, members: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Batch, "run", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        measured(subject("llama", "hooked"))


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("after", [1, 5, 9])
@pytest.mark.parametrize("engine", ["suffix", "full"])
def test_an_interrupted_sweep_goes_on_to_identical_scores(engine: Any, after: int, tmp_path: Path) -> None:
    model = subject("qwen2", "hooked")
    plan = cells(model, ["source"])[::9]
    whole = measured(model, plan, engine=engine, batch_size=2)
    calls = {"n": 0}

    def stop(done: int, total: int) -> None:
        calls["n"] += 1
        if calls["n"] == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(model, plan, engine=engine, batch_size=2, store=tmp_path, progress=stop)
    half = np.load(tmp_path / "done.npy")
    assert 0 < half.sum() < half.size
    again: list[int] = []
    real = Batch.run
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Batch, "run", lambda self, members: (again.append(len(members)), real(self, members))[1])
        found = measured(model, plan, engine=engine, batch_size=2, store=tmp_path)
    assert np.array_equal(found.scores, whole.scores) and np.array_equal(found.baseline, whole.baseline)
    assert 2 * sum(again) == half.size - half.sum(), "what was done is not done again"
    assert np.array_equal(found.source_scores["source"], whole.source_scores["source"])


@pytest.mark.parametrize(
    "other",
    [
        {"metric": Metric("other", "logits", "answers", logit_difference().measure)}, {"engine": "full"},
        {"plan": HEADS[:-1]}, {"plan": [[Intervention(Site(0, "z", head=0), zero())], *HEADS[1:]]},
        {"plan": [[Intervention(Site(0, "z", head=0), patch(), "last")], *HEADS[1:]]},
        {"sources": {"source": RunSource.same(RUN)}}, {"model": ("llama", "bridge")}, {"model": ("qwen2", "hooked")},
    ],
)  # fmt: skip
def test_the_work_of_another_sweep_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    measured(subject("llama", "hooked"), store=tmp_path)
    measured(subject("llama", "hooked"), store=tmp_path)
    how = dict(other)
    model, plan = subject(*how.pop("model", ("llama", "hooked"))), how.pop("plan", HEADS)
    with pytest.raises(BadRun, match="another"):
        measured(model, plan, store=tmp_path, **how)


def test_another_vector_mean_or_run_is_another_sweep(tmp_path: Path) -> None:
    model = subject("llama", "hooked")
    site = Site(1, "resid_post")
    for number, vector in enumerate((torch.ones(32), torch.ones(32) * 2)):
        plan = [[Intervention(site, add(vector))]]
        measured(model, plan, store=tmp_path / f"add{number}")
        with pytest.raises(BadRun):
            measured(model, [[Intervention(site, add(vector, 0.5))]], store=tmp_path / f"add{number}")
    with pytest.raises(BadRun):
        measured(model, [[Intervention(site, add(torch.ones(32) * 2))]], store=tmp_path / "add0")
    plan = [[Intervention(site, patch(), source="mean")]]
    means = [{"mean": MeanSource({(1, "resid_post"): torch.full((32,), value)})} for value in (0.0, 1.0)]
    measured(model, plan, sources=means[0], store=tmp_path / "mean")
    with pytest.raises(BadRun):
        measured(model, plan, sources=means[1], store=tmp_path / "mean")
    two = {"a": RunSource.clean(PAIRS), "b": RunSource.same(RUN)}
    by = [[[Intervention(site, patch(), source=name)]] for name in two]
    measured(model, by[0], sources=two, store=tmp_path / "by")
    with pytest.raises(BadRun):
        measured(model, by[1], sources=two, store=tmp_path / "by")


def test_folded_weights_are_another_model(tmp_path: Path) -> None:
    measured(subject("gpt2", "hooked"), store=tmp_path)
    with pytest.raises(BadRun):
        measured(fresh("gpt2", "hooked", weights="folded"), store=tmp_path)


def test_a_store_keeps_blocks(tmp_path: Path) -> None:
    store = ScoreStore((3, 4), tmp_path, {"a": 1})
    assert not store.has([0], [1])
    store.write([2, 0], [1, 3], np.array([[1, 2], [3, 4]], np.float32))
    again = ScoreStore((3, 4), tmp_path, {"a": 1})
    assert (
        again.has([0, 2], [3, 1]) and not again.has([0, 1], [1]) and again.scores[2, 3] == 2 and again.scores[0, 1] == 3
    )
    for shape, key in (((3, 5), {"a": 1}), ((3, 4), {"a": 2})):
        with pytest.raises(BadRun):
            ScoreStore(shape, tmp_path, key)


# ---------------------------------------------------------------- pairs and cells that cannot be


def test_pairs_without_a_gap_are_unmeasured_and_counted() -> None:
    clean, corrupt = [list(row) for row in PAIRS.clean], [list(row) for row in PAIRS.corrupt]
    corrupt[1] = clean[1]
    given = Pairs.from_tokens(clean, corrupt, PAIRS.answer, PAIRS.wrong)
    found = head_patching(subject("llama", "hooked"), given, options=QUIET)
    assert np.isnan(found.data.values[1]).all() and np.isfinite(found.data.values[[0, 2, 3]]).all()
    assert found.provenance["degenerate"] == 1 and found.values["degenerate"].values.tolist() == [
        False,
        True,
        False,
        False,
    ]
    assert any("unmeasured" in text and "(1)" in text for text in found.warnings)
    same = Pairs.from_tokens(clean, clean, PAIRS.answer, PAIRS.wrong)
    with pytest.raises(UndefinedEffect, match="does not tell clean from corrupt"):
        head_patching(subject("llama", "hooked"), same, options=QUIET)


def test_swapped_answers_are_remarked_upon() -> None:
    model = subject("llama", "hooked")
    tokens = encode(model, PAIRS)
    gap = model.logits(tokens.clean) - model.logits(tokens.corrupt)
    answer, wrong = [[int(row.argmax())] for row in gap], [[int(row.argmin())] for row in gap]
    right = Pairs.from_tokens(PAIRS.clean, PAIRS.corrupt, answer, wrong)
    assert not any("swapped" in text for text in head_patching(model, right, options=QUIET).warnings)
    turned = Pairs.from_tokens(PAIRS.clean, PAIRS.corrupt, wrong, answer)
    assert any("swapped" in text for text in head_patching(model, turned, options=QUIET).warnings)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: head_patching(m, PAIRS, layers=[3]), "layers are 0 to 2"),
        (lambda m: head_patching(m, PAIRS, part="nothing"), "no part 'nothing'"),
        (lambda m: mean_ablation(m, PAIRS, "L1H4"), "heads are 0 to 3"),
        (lambda m: mean_ablation(m, PAIRS, "L1H2.k"), "key-value heads are 0 to 1"),
        (lambda m: measured(m, [[Intervention(Site(1, "mlp_post"), zero(), neurons=(3, 48))]]), "neurons are 0 to 47"),
        (lambda m: measured(m, [[Intervention(Site(7, "z"), zero())]]), "layers are 0 to 2"),
        (lambda m: causal_tracing(m, PAIRS, parts=["resid"], layers="5"), "layers are 0 to 2"),
    ],
)  # fmt: skip
def test_what_the_model_lacks_is_named_with_the_range(call: Callable[[Model], Any], says: str) -> None:
    with pytest.raises(UnknownSite) as caught:
        call(subject("llama", "hooked"))
    assert says in str(caught.value)


@pytest.mark.parametrize("where", ["subject", 99, -99, 7])
def test_positions_that_a_prompt_lacks_are_an_error(where: str | int) -> None:
    with pytest.raises(BadPrompts, match="no position"):
        measured(subject("llama", "hooked"), [[Intervention(Site(0, "z"), zero(), where)]])


def test_a_source_that_was_not_given_is_an_error() -> None:
    with pytest.raises(ValueError, match="no source named 'elsewhere'"):
        measured(subject("llama", "hooked"), [[Intervention(Site(0, "z"), patch(), source="elsewhere")]])
    with pytest.raises(ValueError, match="no value"):
        measured(subject("llama", "hooked"), HEADS, sources={"source": MeanSource({})})


def test_the_suffix_engine_is_refused_where_it_does_not_know_the_model() -> None:
    with pytest.raises(SelfCheckFailed, match="does not cover"):
        measured(subject("olmo2", "hooked"), engine="suffix")
    assert measured(subject("olmo2", "hooked")).engine == "full"


# ---------------------------------------------------------------- numbers


def test_effects_are_fractions_of_the_gap_in_both_directions() -> None:
    model = subject("llama", "hooked")
    plan = [[Intervention(Site(0, "resid_pre"), patch())], *HEADS[:3]]
    there = patch_effects(model, pairs(ragged=False), plan, metric=logit_difference(), options=QUIET)
    back = patch_effects(model, pairs(ragged=False), plan, metric=logit_difference(), direction="noise", options=QUIET)
    keep = [0, 2, 3]  # pair 1 has a named position that crosses
    assert np.allclose(there.effect[keep, 0], 1, atol=1e-4) and np.allclose(back.effect[keep, 0], -1, atol=1e-4)
    assert np.allclose(there.clean, back.clean, atol=1e-5) and np.allclose(there.corrupt, back.corrupt, atol=1e-5)
    other = patch_effects(
        model,
        pairs(ragged=False),
        plan,
        metric=logit_difference(),
        source_model=subject("llama", "bridge", 1),
        options=QUIET,
    )
    assert np.allclose(other.corrupt, there.corrupt, atol=1e-5) and not np.allclose(other.clean, there.clean, atol=1e-2)


@pytest.mark.parametrize(("family", "backend"), [("gpt2", "hooked"), ("llama", "bridge"), ("gemma2", "hooked")])
def test_half_precision_and_double(family: str, backend: str) -> None:
    single = measured(subject(family, backend))
    half = measured(subject(family, backend, dtype="bfloat16"))
    assert half.engine == "suffix" and half.scores.dtype == np.float32
    assert np.isfinite(half.scores).all() and np.corrcoef(half.scores.ravel(), single.scores.ravel())[0, 1] > 0.99
    assert len(np.unique(half.scores)) > 0.5 * half.scores.size, "read out in fp32, not rounded to bf16"
    double = measured(subject(family, backend, dtype="float64"))
    assert double.engine == "suffix" and worst(double.scores, single.scores).max() < 1e-4


def test_price_is_estimated_without_running_cells() -> None:
    model = subject("llama", "hooked")
    cost = estimate(model, RUN, HEADS)
    assert cost.scores == len(RUN) * len(HEADS) and 0 < cost.passes < cost.naive_passes == len(RUN) * 14
    late = estimate(model, RUN, [c for c in HEADS if c[0].site.layer == 2])
    early = estimate(model, RUN, [c for c in HEADS if c[0].site.layer == 0])
    assert late.passes < early.passes and cost.peak_bytes > 0 and cost.free_bytes > 0 and cost.seconds > 0
    slow = estimate(subject("olmo2", "hooked"), RUN, HEADS)
    assert slow.passes == slow.naive_passes


def test_progress_counts_every_score_once() -> None:
    seen: list[tuple[int, int]] = []
    measured(subject("llama", "hooked"), batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(RUN) * 12, len(RUN) * 12) and [d for d, _ in seen] == sorted({d for d, _ in seen})


def test_chunks_hold_every_cell_once_within_the_budget() -> None:
    model = subject("llama", "hooked")
    made = sources(model, RUN, RunSource.clean(PAIRS), None)
    plan = cells(model, list(made))
    with torch.inference_mode():
        batch = Batch(model, RUN, list(range(len(RUN))), plan, logit_difference(), made, "suffix")
        for budget in (1, 40, 4096):
            chunks = list(batch.chunks(budget))
            assert sorted(number for chunk in chunks for number in chunk) == list(range(len(plan)))
            assert isinstance(batch.engine, SuffixEngine)
            if budget == 1:
                assert all(len(chunk) == 1 for chunk in chunks)
            entries = [{min((i.site.layer, i.site.part) for i in plan[n])[0] for n in chunk} for chunk in chunks]
            assert all(len(layers) == 1 for layers in entries), "cells of a chunk enter at the same layer"
