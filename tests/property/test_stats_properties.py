"""What must hold for any effects: symmetries of the estimates, and order among them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mech_align import stats

FIELDS = ("mean", "ci_low", "ci_high", "p", "p_maxt", "q")
# Multiples of 1/64 give ties, zeros and constant cells, and sums without rounding.
effects = st.one_of(st.integers(-640, 640).map(lambda i: i / 64), st.just(float("nan")))
tables = hnp.arrays(float, st.tuples(st.integers(1, 9), st.integers(1, 6)), elements=effects)
quick = settings(max_examples=60, deadline=None)


def summary(values: np.ndarray, groups: list[int] | None = None) -> stats.Summary:
    return stats.summarize(values, groups, n_resamples=60, n_flips=64)


@quick
@given(tables)
def test_ranges_and_missing_values(values: np.ndarray):
    s = summary(values)
    missing = np.isnan(values).all(0)
    assert (np.isnan(s.mean) == missing).all() and (np.isnan(s.p) == missing).all()
    seen = ~missing
    assert (s.p[seen] > 0).all() and (s.q[seen] <= 1).all()
    assert (s.p_maxt[seen] <= 1).all() and (s.p[seen] >= s.p_floor - 1e-12).all()
    if 2 ** (len(values) - 1) <= 64:  # refined p come from more flips than max-T
        assert (s.p_maxt[seen] >= s.p[seen] - 1e-12).all()
    assert (s.q[seen] >= s.p[seen] - 1e-12).all()
    few = (~np.isnan(values)).sum(0) < 2
    assert (np.isnan(s.ci_low) == few).all()
    assert (s.ci_low[~few] <= s.mean[~few] + 1e-12).all() and (s.mean[~few] <= s.ci_high[~few] + 1e-12).all()


@quick
@given(tables)
def test_sign_symmetry(values: np.ndarray):
    plus, minus = summary(values), summary(-values)
    np.testing.assert_allclose(minus.mean, -plus.mean, atol=1e-12)
    np.testing.assert_allclose(minus.ci_low, -plus.ci_high, atol=1e-9)
    for name in ("p", "p_maxt", "q"):
        np.testing.assert_allclose(getattr(minus, name), getattr(plus, name), atol=1e-12)


@quick
@given(tables, st.sampled_from([1e-30, 1e-6, 0.37, 3.0, 1e12]))
def test_scale_equivariance(values: np.ndarray, scale: float):
    unit, scaled = summary(values), summary(values * scale)
    for name in ("mean", "ci_low", "ci_high"):
        np.testing.assert_allclose(getattr(scaled, name) / scale, getattr(unit, name), atol=1e-9)
    for name in ("p", "p_maxt", "q"):
        np.testing.assert_allclose(getattr(scaled, name), getattr(unit, name), atol=1e-12)


@quick
@given(tables, st.data())
def test_order_of_prompts_and_cells_does_not_matter(values: np.ndarray, data: st.DataObject):
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)))
    prompts = data.draw(st.permutations(range(len(values))))
    cells = data.draw(st.permutations(range(values.shape[1])))
    one, other = summary(values, groups), summary(values[prompts][:, cells], [groups[i] for i in prompts])
    for name in FIELDS:
        np.testing.assert_allclose(getattr(other, name), getattr(one, name)[cells], atol=1e-12, err_msg=name)


@quick
@given(tables)
def test_max_t_is_monotone_in_the_statistic(values: np.ndarray):
    s = summary(np.nan_to_num(values))
    total = np.nan_to_num(values)
    square = (total**2).sum(0)
    statistic = np.abs(total.sum(0)) / np.sqrt(square + 4 * (square / len(total)).mean() + 1e-300)
    order = np.argsort(statistic)
    assert (np.diff(s.p_maxt[order]) <= 1e-12).all() or np.isclose(np.diff(statistic[order]), 0).any()


@quick
@given(tables, st.floats(1e-9, 2))
def test_normalise_is_finite_or_nan(patched: np.ndarray, gap: float):
    clean = np.linspace(0, gap, len(patched))
    fraction, degenerate = stats.normalise(patched, clean, np.zeros(len(patched)))
    assert not np.isinf(fraction).any()
    assert np.isnan(fraction[degenerate]).all()
    np.testing.assert_allclose(
        (fraction * clean[:, None])[~degenerate], patched[~degenerate], rtol=1e-9, equal_nan=True
    )


@quick
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 200), st.integers(0, 20))
def test_miss_rate_is_ordered(sampled: int, large: int, more: int, found: int):
    large = min(large, sampled)
    sample = np.array([1.0] * large + [0.0] * (sampled - large))
    result = stats.miss_rate(np.ones(found), sample, sampled + more, threshold=0.5)
    assert large <= result.missed.low <= result.missed.high <= sampled + more - (sampled - large)
    if sampled:
        assert result.missed.low - 1e-9 <= result.missed.estimate <= result.missed.high + 1e-9
