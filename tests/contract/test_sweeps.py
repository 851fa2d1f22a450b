"""Scores of a sweep = one whole forward pass a prompt and cell, for every family, part, edit, source and position."""

from typing import Any

import numpy as np
import pytest
from contract.subjects import EVERYONE, SUBJECTS, UNCOVERED, by_hand, cells, measure, pairs, sources, subject, worst

from mech_align.metrics import get_metric, logit_difference
from mech_align.sweeps import Run, RunSource, score, sweep

EXACT = 1e-5


def quiet(done: int, total: int) -> None:
    """No progress bar."""


def setting(family: str, backend: str, direction: str = "denoise", *, ragged: bool = True) -> Any:
    model = subject(family, backend)
    other = None if family == "attn_only" else subject(family, "bridge", 1)
    given = pairs(ragged=ragged)
    denoise = direction == "denoise"
    run = Run.corrupt(given) if denoise else Run.clean(given)
    made = sources(model, run, RunSource.clean(given) if denoise else RunSource.corrupt(given), other)
    return model, run, made, cells(model, list(made))


@pytest.mark.parametrize(
    ("family", "backend", "direction"),
    [(*who, "denoise") for who in SUBJECTS]
    + [(*SUBJECTS[at + at // 2 % 2], "noise") for at in range(0, len(SUBJECTS), 2)],
)
def test_suffix_scores_are_those_of_full_passes(family: str, backend: str, direction: str) -> None:
    model, run, made, plan = setting(family, backend, direction)
    fast = sweep(model, run, plan, metric=logit_difference(), sources=made, engine="suffix", progress=quiet)
    assert fast.engine == "suffix" and not fast.warnings
    # Every part of the plan meets every family; which subject checks which cell changes from one to the next.
    first = SUBJECTS.index((family, backend))
    some = list(range(first % 6, len(plan), 6)) + list(range(len(plan) - 8, len(plan)))
    full = sweep(
        model, run, [plan[i] for i in some], metric=logit_difference(), sources=made, engine="full", progress=quiet
    )
    # Rounding goes with the size of the logits that a score is the difference of.
    size = max(1.0, float(model.logits([list(row) for row in run.tokens]).abs().max()) / 2)
    error = worst(fast.scores[:, some], full.scores) / size
    at = int(error.max(0).argmax())
    assert error.max() <= EXACT, f"{error.max():.2g} at {[str(i) for i in plan[some[at]]]}"
    assert worst(fast.baseline, full.baseline).max() <= EXACT
    for name in fast.source_scores:
        assert worst(fast.source_scores[name], full.source_scores[name]).max() <= EXACT
    assert np.abs(full.scores - full.baseline[:, None]).max() > 0.1, "the cells do something"
    assert fast.checks["random cell - full forward"] < 1e-4 and fast.checks["hooks left behind"] == 0


@pytest.mark.parametrize(("family", "backend"), EVERYONE)
def test_scores_are_those_of_one_prompt_and_cell_at_a_time(family: str, backend: str) -> None:
    model, run, made, plan = setting(family, backend)
    step = 7 if family == UNCOVERED else 9
    some = [*range(EVERYONE.index((family, backend)) % step, len(plan) - 1, step), len(plan) - 1]
    found = sweep(model, run, [plan[i] for i in some], metric=logit_difference(), sources=made, progress=quiet)
    assert found.engine == ("full" if family == UNCOVERED else "suffix")
    for column, number in enumerate(some):
        row = number % len(run) if number < len(plan) - 1 else 2
        wanted = by_hand(model, run, row, plan[number], made, logit_difference())
        assert abs(found.scores[row, column] - wanted) <= 2 * EXACT * max(1.0, abs(wanted)), [
            str(i) for i in plan[number]
        ]


@pytest.mark.parametrize("name", ["log_odds", "probability", "log_probability"])
@pytest.mark.parametrize(("family", "backend"), [("gpt2", "bridge"), ("gemma2", "hooked")])
def test_every_metric_is_read_alike(family: str, backend: str, name: str) -> None:
    model, run, made, plan = setting(family, backend)
    metric = get_metric(name)
    some = plan[::25]
    fast = sweep(model, run, some, metric=metric, sources=made, engine="suffix", progress=quiet)
    full = sweep(model, run, some, metric=metric, sources=made, engine="full", progress=quiet)
    assert worst(fast.scores, full.scores).max() <= EXACT
    logits = model.logits([list(row) for row in run.tokens])
    for row in range(len(run)):
        assert abs(measure(logits[row], run, row, metric) - fast.baseline[row]) <= 1e-5 * max(
            1, abs(fast.baseline[row])
        )


@pytest.mark.parametrize(("family", "backend"), [("llama", "hooked"), ("gpt_neox", "bridge"), ("gemma3", "bridge")])
def test_batch_sizes_do_not_matter(family: str, backend: str) -> None:
    model, run, made, plan = setting(family, backend)
    some = plan[::11]
    alone = sweep(model, run, some, metric=logit_difference(), sources=made, batch_size=1, progress=quiet)
    for size in range(2, len(run) + 2):
        more = sweep(model, run, some, metric=logit_difference(), sources=made, batch_size=size, progress=quiet)
        assert worst(more.scores, alone.scores).max() <= EXACT
        assert worst(more.baseline, alone.baseline).max() <= EXACT
    assert worst(score(model, run, logit_difference()), alone.baseline).max() <= EXACT


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_equal_lengths_and_both_backends(family: str) -> None:
    found = []
    for backend in ("hooked", "bridge"):
        model, run, made, plan = setting(family, backend, ragged=False)
        found.append(sweep(model, run, plan, metric=logit_difference(), sources=made, engine="suffix", progress=quiet))
    assert worst(found[0].scores, found[1].scores).max() <= 1e-4
