"""Intervals that cover, tests that keep their level, guards that never give inf: by scipy, by hand, by simulation."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats as sps

from mech_align import stats
from mech_align.errors import MechAlignError, UndefinedEffect


def brute_force(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-cell p and step-down max-T p, straight from their definitions, over all 2^G patterns."""
    signs = np.array(list(itertools.product([-1, 1], repeat=len(sums))))
    square = (sums**2).sum(0)
    statistic = sums / np.sqrt(square + 4 * (square / len(sums)).mean())
    flipped, observed = np.abs(signs @ statistic), np.abs(statistic.sum(0))
    p = (flipped >= observed - 1e-9).mean(0)
    p_max, least = np.empty_like(p), 0.0
    remaining = list(np.argsort(-observed))
    while remaining:
        cell = remaining[0]
        least = max(least, float((flipped[:, remaining].max(1) >= observed[cell] - 1e-9).mean()))
        p_max[cell] = least
        remaining.pop(0)
    return p, p_max


# ── summarize ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_mean_weighs_prompts_alike_and_skips_nan():
    values = np.array([[1.0, 2.0], [3.0, np.nan], [8.0, 4.0], [np.nan, np.nan]])
    summary = stats.summarize(values, ["a", "a", "b", "c"])
    assert summary.mean.tolist() == [4.0, 3.0]
    assert summary.n.tolist() == [3, 2]
    assert summary.n_groups == 2  # "c" was never measured


def test_flip_tests_equal_their_definition():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(14, 9)) * rng.lognormal(size=9) + [2, 1, 0.5, 0, 0, 0, 0, 0, 0]
    groups = np.arange(14) % 7
    summary = stats.summarize(values, groups.tolist())
    p, p_max = brute_force(np.stack([values[groups == g].sum(0) for g in range(7)]))
    np.testing.assert_allclose(summary.p, p, atol=1e-12)
    np.testing.assert_allclose(summary.p_maxt, p_max, atol=1e-12)
    assert summary.p_floor == 2 / 2**7
    # BH by hand
    order = np.argsort(p)
    q = np.minimum.accumulate((p[order] * 9 / np.arange(1, 10))[::-1])[::-1]
    np.testing.assert_allclose(summary.q[order], np.minimum(q, 1))


def test_agrees_with_scipy_on_ungrouped_data():
    x = np.random.default_rng(1).normal(0.4, 1, size=12)
    summary = stats.summarize(x[:, None], n_resamples=20_000)
    test = sps.permutation_test((x,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert summary.p[0] == pytest.approx(test.pvalue)
    plain = sps.bootstrap((x,), np.mean, method="percentile", n_resamples=20_000, rng=2).confidence_interval
    factor = math.sqrt(12 / 11) * sps.t.ppf(0.975, 11) / sps.norm.ppf(0.975)
    assert summary.ci_low[0] == pytest.approx(x.mean() - factor * (x.mean() - plain.low), abs=0.02)
    assert summary.ci_high[0] == pytest.approx(x.mean() + factor * (plain.high - x.mean()), abs=0.02)


def test_random_flips_agree_with_all_flips():
    values = np.random.default_rng(2).normal(0.3, 1, size=(12, 6))
    exact = stats.summarize(values)
    sampled = stats.summarize(values, n_flips=2_000)  # < 2^11
    np.testing.assert_allclose(sampled.p, exact.p, atol=0.04)
    np.testing.assert_allclose(sampled.p_maxt, exact.p_maxt, atol=0.04)
    assert (sampled.p >= 1 / 2_001).all()


def test_random_flips_never_give_zero_and_go_on_for_large_maps():
    values = 1 + np.random.default_rng(3).normal(size=(30, 144)) * 0.01  # no pattern but +-all reaches these sums
    one = stats.summarize(values[:, :1], n_resamples=2, n_flips=500)
    assert one.p[0] == one.p_maxt[0] == one.p_floor == 1 / 501
    many = stats.summarize(values, n_resamples=2, n_flips=500)
    assert (many.p == 1 / (144 / 0.05 + 1)).all() and many.p_floor == many.p[0]
    assert (many.p_maxt == 1 / 501).all()


@pytest.mark.parametrize(("n_groups", "least"), [(3, 0.92), (5, 0.92), (8, 0.93), (30, 0.93)])
def test_intervals_cover(n_groups: int, least: float):
    rng = np.random.default_rng(n_groups)
    worlds = 800  # each cell is one world: correlated prompts, two to five a group
    size = rng.integers(2, 6, size=n_groups)
    groups = np.repeat(np.arange(n_groups), size)
    values = rng.normal(size=(n_groups, worlds))[groups] + rng.normal(size=(len(groups), worlds))
    grouped = stats.summarize(values, groups.tolist(), n_resamples=800, n_flips=8)
    cover = np.mean((grouped.ci_low <= 0) & (grouped.ci_high >= 0))
    assert least <= cover <= 0.975
    naive = stats.summarize(values, n_resamples=800, n_flips=8)
    assert np.mean((naive.ci_low <= 0) & (naive.ci_high >= 0)) < cover - 0.05  # what ignoring the groups would do


def test_max_t_keeps_its_level_and_raw_p_does_not():
    rng = np.random.default_rng(5)
    family = uncorrected = 0
    for _ in range(300):
        values = rng.normal(size=(8, 1)) * 0.5 + rng.normal(size=(8, 30)) * rng.lognormal(0, 1, size=30)
        summary = stats.summarize(values, n_resamples=2)
        family += bool((summary.p_maxt <= 0.05).any())
        uncorrected += bool((summary.p <= 0.05).any())
    assert family <= 0.05 * 300 + 3 * math.sqrt(300 * 0.05 * 0.95)
    assert uncorrected > 150


def test_refined_p_values_keep_their_level():
    # 16 groups and few base flips: nearly every small p goes through the second stage.
    values = np.random.default_rng(6).normal(size=(16, 4_000))
    p = stats.summarize(values, n_resamples=2, n_flips=200).p
    for level in (0.0005, 0.005, 0.02, 0.03, 0.1):
        assert np.mean(p <= level) <= level + 4 * math.sqrt(level / 4_000)
    assert p.min() < 1 / 201


def test_planted_cells_are_found_in_a_large_map():
    rng = np.random.default_rng(7)
    values = rng.normal(size=(32, 40, 20)) * rng.lognormal(-3.5, 0.8, size=(40, 20))
    planted = [(3, 4), (20, 7), (39, 19)]
    for i, cell in enumerate(planted):
        values[(slice(None), *cell)] += 0.5 - 0.15 * i + rng.normal(size=32) * 0.1
    summary = stats.summarize(values, (np.arange(32) // 2).tolist())
    found = {tuple(map(int, c)) for c in np.argwhere(summary.p_maxt <= 0.05)}
    assert set(planted) <= found
    assert len(found) <= 4
    assert all(summary.q[cell] <= 0.05 for cell in planted)
    assert summary.mean.shape == (40, 20)
    assert abs(summary.mean[3, 4] - 0.5) < 0.06
    assert summary.ci_low[3, 4] < 0.5 < summary.ci_high[3, 4]


def test_one_noisy_cell_does_not_hide_the_others():
    rng = np.random.default_rng(8)
    values = rng.normal(size=(8, 100)) * 0.02
    values[:, 0] += 0.3
    values[:, 1] = rng.normal(size=8) * 0.8
    assert stats.summarize(values).p_maxt[0] <= 0.05


def test_odd_cells():
    values = np.full((8, 6), np.nan)
    values[:, 1] = 0.0
    values[:, 2] = 0.7  # the same in every prompt
    values[0, 3] = 5.0  # measured once
    values[:, 4] = np.tile([1.0, -1.0], 4)
    values[:, 5] = [np.inf, 1, 1, 1, 1, 1, 1, 1]
    summary = stats.summarize(values)
    columns = (summary.mean, summary.ci_low, summary.ci_high, summary.p, summary.p_maxt, summary.q)
    assert all(np.isnan(column[0]) for column in columns)
    assert (summary.p[1], summary.p_maxt[1], summary.q[1]) == (1, 1, 1)
    assert (summary.ci_low[1], summary.ci_high[1]) == (0, 0)
    assert summary.p[2] == 2 / 2**8
    assert summary.ci_low[2] == pytest.approx(0.7) == summary.ci_high[2]
    assert math.isnan(summary.ci_low[3]) and math.isnan(summary.ci_high[3]) and summary.p[3] == 1
    assert summary.p[4] == 1
    assert summary.n.tolist() == [0, 8, 8, 1, 8, 7]
    assert any("infinite" in w for w in summary.warnings)
    assert any("one group only" in w for w in summary.warnings)
    assert not any(np.isinf(column).any() for column in columns)


def test_all_zero_and_all_missing_maps():
    zero = stats.summarize(np.zeros((8, 3)))
    assert zero.p_maxt.tolist() == [1, 1, 1] == zero.q.tolist()
    missing = stats.summarize(np.full((8, 3), np.nan))
    assert np.isnan(missing.p).all() and missing.n_groups == 0 and missing.warnings
    empty = stats.summarize(np.zeros((4, 0)))
    assert empty.mean.shape == (0,)


@pytest.mark.parametrize("n", [1, 6])
def test_one_group_gets_no_interval(n: int):
    values = np.random.default_rng(0).normal(size=(n, 3))
    summary = stats.summarize(values, ["same"] * n)
    assert np.isnan(summary.ci_low).all() and np.isnan(summary.ci_high).all()
    assert summary.p.tolist() == [1, 1, 1]
    assert summary.warnings == [
        "one group only: no interval can be given and no test can reject; measure at least 2 groups"
    ]


def test_scalar_cells_and_numpy_labels():
    summary = stats.summarize(np.array([1.0, 2.0, 3.0]), np.array(["a", "b", "c"]))
    assert summary.mean.shape == () and float(summary.mean) == 2.0 and float(summary.p) == 0.25


@pytest.mark.parametrize(
    ("n_groups", "cells", "n_flips", "expected"),
    [
        (4, 144, 10_000, ["max-T at 0.05 needs >= 6 groups; you have 4", "no cell can pass"]),
        (6, 144, 10_000, ["23"]),
        (12, 144, 10_000, ["2 or more", ">= 13 groups (you have 12)"]),
        (13, 144, 10_000, []),
        (40, 144, 10_000, []),
        (6, 1, 10_000, []),
    ],
)
def test_warnings_name_what_is_needed(n_groups: int, cells: int, n_flips: int, expected: list[str]):
    values = np.random.default_rng(0).normal(size=(n_groups, cells))
    if expected == ["23"]:
        expected = [f"{math.ceil(2 / 2**6 * 144 / 0.05)} or more"]
    warnings = stats.summarize(values, n_resamples=10, n_flips=n_flips).warnings
    assert all(text in " ".join(warnings) for text in expected)
    assert bool(warnings) == bool(expected)


@pytest.mark.parametrize(("n_groups", "can"), [(5, False), (6, True), (12, False), (13, True)])
def test_the_floors_in_the_warnings_are_real(n_groups: int, can: bool):
    # One enormous effect among 144 cells of noise: exactly when the warning is silent can it pass.
    values = np.random.default_rng(1).normal(size=(n_groups, 144)) * 1e-3
    values[:, 5] = 10 + values[:, 5]
    summary = stats.summarize(values, n_resamples=10)
    passed = summary.p_maxt[5] <= 0.05 if n_groups < 10 else summary.q[5] <= 0.05
    assert bool(passed) is can


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(3).normal(0.2, 1, size=(18, 37))
    values[np.random.default_rng(4).random(values.shape) < 0.2] = np.nan
    groups = [f"g{i % 16}" for i in range(18)]
    whole = stats.summarize(values, groups, n_resamples=300, n_flips=500)
    monkeypatch.setattr(stats, "_BLOCK", 2_000)
    parts = stats.summarize(values, groups, n_resamples=300, n_flips=500)
    for name in ("mean", "ci_low", "ci_high", "p", "p_maxt", "q", "n"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, err_msg=name)


def test_memory_of_a_head_by_position_map():
    values = np.random.default_rng(0).normal(size=(32, 10_800))
    tracemalloc.start()
    stats.summarize(values, (np.arange(32) // 4).tolist())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


@pytest.mark.parametrize("groups", [["a"], ["a", None, "b"], ["a", "", "b"], ["a", float("nan"), "b"]])
def test_bad_groups_are_refused(groups: list[object]):
    with pytest.raises(MechAlignError) as error:
        stats.summarize(np.ones((3, 2)), groups)
    assert error.value.hints


def test_bad_settings_are_refused():
    for settings in ({"confidence": 1.0}, {"n_resamples": 0}, {"n_flips": 0}):
        with pytest.raises(MechAlignError):
            stats.summarize(np.ones((3, 2)), **settings)
    with pytest.raises(MechAlignError):
        stats.summarize(np.ones((0, 2)))


# ── split half ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_split_half_removes_the_winners_curse():
    rng = np.random.default_rng(0)
    selected, confirmed = [], []
    for seed in range(20):
        values = rng.normal(size=(12, 10, 20))
        for record in stats.split_half(values, None, 3, seed=seed, n_resamples=20):
            sign = np.sign(record.selection_mean)
            selected.append(sign * record.selection_mean)
            confirmed.append(sign * record.mean)
    assert np.mean(selected) > 0.8  # pure noise, chosen because it is large
    assert abs(np.mean(confirmed)) < 0.2


def test_split_half_confirms_a_planted_cell_on_other_groups():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(24, 6, 5)) * 0.1
    values[:, 4, 2] += 1.0
    groups = [f"g{i // 2}" for i in range(24)]
    records = stats.split_half(values, groups, 2, reverse=True)
    assert [r.selected_on for r in records] == ["A", "A", "B", "B"]
    for record in (records[0], records[2]):
        assert record.index == (4, 2) and record.cell == 22
        assert record.ci_low < 1 < record.ci_high and record.ci_low > 0
        assert (record.n, record.n_groups, record.p_floor) == (12, 6, 2 / 2**6)
    # Both halves together are the whole: no group was in both.
    whole = values[:, 4, 2].mean()
    assert (records[0].mean + records[2].mean) / 2 == pytest.approx(whole)
    assert records[0].selection_mean == pytest.approx(records[2].mean)


def test_split_half_needs_four_groups_and_ignores_unmeasured_cells():
    values = np.ones((8, 3))
    values[:, 0] = np.nan
    with pytest.raises(MechAlignError, match="2 groups in each half"):
        stats.split_half(values, ["a", "b", "c"] * 2 + ["a", "b"], 1)
    assert sorted(r.cell for r in stats.split_half(values, None, 3)) == [1, 2]
    with pytest.raises(MechAlignError):
        stats.split_half(values, None, 0)


# ── controls, screens, outcomes ─────────────────────────────────────────────────────────────────────────────────────


def test_rank_against_controls():
    controls = np.linspace(-0.1, 0.1, 20)
    big = stats.rank_against_controls(-0.5, controls)
    assert big.p == pytest.approx(1 / 21) and not big.warnings
    assert big.z == pytest.approx(-0.5 / controls.std(ddof=1))
    assert (big.control_low, big.control_high, big.n_controls) == (-0.1, 0.1, 20)
    assert stats.rank_against_controls(-0.5, controls, alternative="greater").p == 1
    assert stats.rank_against_controls(-0.5, controls, alternative="less").p == pytest.approx(1 / 21)
    assert stats.rank_against_controls(0.1, controls, alternative="greater").p == pytest.approx(2 / 21)  # a tie counts
    few = stats.rank_against_controls(1.0, np.array([0.1, 0.1, 0.1, np.nan]))
    assert few.n_controls == 3 and few.warnings and math.isnan(few.z)
    with pytest.raises(MechAlignError):
        stats.rank_against_controls(math.nan, controls)


def test_miss_rate_by_hand_and_by_simulation():
    result = stats.miss_rate(np.array([1.0, -2.0, 0.1]), np.array([0.9, 0.0, 0.0, np.nan]), 30, threshold=0.5)
    assert (result.found, result.sampled, result.sample_large) == (2, 3, 1)
    assert result.missed.estimate == pytest.approx(10)
    assert result.rate.estimate == pytest.approx(10 / 12)
    # The limits straight from their definition
    allowed = [k for k in range(31) if sps.hypergeom.sf(0, 30, k, 3) > 0.025 and sps.hypergeom.cdf(1, 30, k, 3) > 0.025]
    assert (result.missed.low, result.missed.high) == (allowed[0], allowed[-1])

    rng = np.random.default_rng(0)
    rest = np.zeros(200)
    rest[:15] = 1.0
    covered = 0
    for _ in range(300):
        interval = stats.miss_rate(np.ones(5), rng.choice(rest, 40, replace=False), 200, threshold=0.5).missed
        covered += interval.low <= 15 <= interval.high
    assert covered / 300 >= 0.94


def test_miss_rate_limits_of_knowledge():
    nothing_sampled = stats.miss_rate(np.ones(3), np.array([]), 50, threshold=0.5)
    assert math.isnan(nothing_sampled.missed.estimate)
    assert (nothing_sampled.missed.low, nothing_sampled.missed.high) == (0, 50)
    all_sampled = stats.miss_rate(np.ones(3), np.array([1.0, 0.0]), 2, threshold=0.5)
    assert all_sampled.missed == (1, 1, 1)
    none_seen = stats.miss_rate(np.zeros(3), np.zeros(100), 10_000, threshold=0.5)
    assert none_seen.missed.low == 0 and 300 < none_seen.missed.high < 400  # the rule of three, two-sided: 3.7 %
    assert math.isnan(none_seen.rate.estimate) and none_seen.rate.high == 1
    with pytest.raises(MechAlignError):
        stats.miss_rate(np.ones(3), np.zeros(5), 4, threshold=0.5)


def test_wilson_and_mcnemar():
    # Newcombe (1998), Statistics in Medicine 17: 81 of 263, Wilson score limits 0.2553 and 0.3662
    assert stats.wilson(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert stats.wilson(0, 10).low == 0 and math.isnan(stats.wilson(0, 0).estimate)
    with pytest.raises(MechAlignError):
        stats.wilson(3, 2)
    before = np.array([True] * 6 + [False] * 14)
    after = np.array([True] * 5 + [False] * 6 + [True] * 9)
    result = stats.mcnemar(before, after)
    assert (result.gained, result.lost, result.change) == (9, 1, 8 / 20)
    assert result.p == pytest.approx(2 * 11 / 2**10)
    assert stats.mcnemar(before, before).p == 1
    with pytest.raises(MechAlignError):
        stats.mcnemar(before, after[:5])


# ── effect sizes and ratios ─────────────────────────────────────────────────────────────────────────────────────────


def test_robust_z():
    row = np.array([1.0, 2.0, 3.0, 4.0, 100.0, np.nan])
    z = stats.robust_z(row)
    assert z[:5] == pytest.approx((row[:5] - 3) / 1.4826) and math.isnan(z[5])
    table = np.stack([row, np.full(6, 0.1), np.full(6, np.nan)])
    assert np.isnan(stats.robust_z(table, axis=1)[1:]).all()
    np.testing.assert_allclose(stats.robust_z(table, axis=1)[0], z)
    normal = np.random.default_rng(0).normal(3, 2, size=20_000)
    assert stats.robust_z(normal).std() == pytest.approx(1, abs=0.03)


def test_cohens_d():
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 1.0, 2.0])
    d = stats.cohens_d(a, b)
    assert d.estimate == pytest.approx(1.5 / math.sqrt((3 * a.var(ddof=1) + 2 * b.var(ddof=1)) / 5))
    assert all(math.isnan(x) for x in stats.cohens_d(np.ones(4), np.ones(4)))
    assert math.isnan(stats.cohens_d(a, b, (["x"] * 4, ["y"] * 3)).low)
    far = stats.cohens_d(a + 1e6, b + 1e6)
    assert far == pytest.approx(d, rel=1e-6)


@pytest.mark.parametrize("n_groups", [4, 10])
def test_cohens_d_covers_with_groups(n_groups: int):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(n_groups), 4).tolist()
    covered = naive = 0
    for seed in range(150):
        shift = rng.normal(size=(2, n_groups)) * 0.8  # each arm has its own template effects
        a, b = (np.repeat(s, 4) + rng.normal(size=4 * n_groups) * 0.6 for s in shift)
        arms = (labels, [f"b{x}" for x in labels])
        low, high = stats.cohens_d(a + 2, b, arms, n_resamples=400, seed=seed)[1:]
        covered += low <= 2 <= high
        low, high = stats.cohens_d(a + 2, b, n_resamples=400, seed=seed)[1:]
        naive += low <= 2 <= high
    assert covered / 150 >= 0.91
    assert naive < covered - 10


def test_cohens_d_draws_shared_groups_together():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(12), 2).tolist()
    template = np.repeat(rng.normal(size=12), 2)  # moves both samples alike
    a, b = template + 0.1 + rng.normal(size=24) * 0.1, template + rng.normal(size=24) * 0.1
    together = stats.cohens_d(a, b, (labels, labels))
    apart = stats.cohens_d(a, b, (labels, [f"b{x}" for x in labels]))
    assert together.estimate == apart.estimate
    assert together.high - together.low < 0.7 * (apart.high - apart.low)


def test_normalise_guards_weak_pairs():
    clean, corrupt = np.array([2.0, 1.0, 0.001, np.nan, 3.0]), np.array([0.0, 0.5, 0.0, 0.0, 1.0])
    patched = np.array([[1.0, 2.0], [0.5, 1.0], [5.0, 5.0], [1.0, 1.0], [np.nan, np.inf]])
    fraction, degenerate = stats.normalise(patched, clean, corrupt)
    assert degenerate.tolist() == [False, False, True, True, False]
    np.testing.assert_allclose(fraction[:2], [[0.5, 1.0], [0.0, 1.0]])
    assert np.isnan(fraction[2:]).all()
    assert not stats.normalise(patched, clean, corrupt, min_gap=1e-4)[1][2]
    flat, all_degenerate = stats.normalise(patched, clean, clean)
    assert np.isnan(flat).all() and all_degenerate.all()
    with pytest.raises(MechAlignError, match="do not match"):
        stats._patched_and_gap(patched, clean[:3], corrupt)  # behind the hook's own check of shapes


def test_ratio_of_means():
    rng = np.random.default_rng(0)
    gap = rng.uniform(0.5, 4, size=40)
    corrupt = rng.normal(size=40)
    restored = np.array([0.0, 0.3, 1.0])
    patched = corrupt[:, None] + gap[:, None] * restored + rng.normal(size=(40, 3)) * 0.1
    patched[0, 1] = np.nan
    result = stats.ratio_of_means(patched, corrupt + gap, corrupt, (np.arange(40) // 4).tolist())
    assert result.estimate == pytest.approx(restored, abs=0.03)
    assert (result.ci_low < restored).all() and (restored < result.ci_high).all()
    assert (result.ci_high - result.ci_low < 0.1).all()
    # A pair without a gap, which blows the mean of ratios up, hardly matters here.
    gap[0] = 1e-6
    steady = stats.ratio_of_means(patched, corrupt + gap, corrupt)
    assert np.abs(steady.estimate[1] - 0.3) < 0.05
    signs = np.tile([1.0, -0.9], 20)
    assert np.isnan(stats.ratio_of_means(patched, corrupt + signs, corrupt).ci_low).all()
    with pytest.raises(UndefinedEffect):
        stats.ratio_of_means(patched, corrupt, corrupt)
