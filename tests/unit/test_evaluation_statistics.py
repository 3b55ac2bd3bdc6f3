"""Statistics: known answers, coverage by simulation, and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vggrpo.evaluation.statistics import (
    Interval,
    holm,
    mean_by_prompt,
    motion_matched,
    non_inferiority,
    paired_bootstrap,
    spearman,
    win_rate,
    within_group_spearman,
)


def simulate(rng: np.random.Generator, prompts: int = 50, seeds: int = 4) -> np.ndarray:
    """Paired differences (prompts, seeds) with mean 0.3 that share most of their noise within a prompt."""
    return 0.3 + rng.normal(0, 1, (prompts, 1)) + rng.normal(0, 0.6, (prompts, seeds))


def test_interval_over_prompts_covers_what_it_claims_and_pooling_does_not() -> None:
    rng = np.random.default_rng(0)
    runs, hits, pooled_hits = 400, 0, 0
    for run in range(runs):
        table = simulate(rng)
        values = {(str(p), s): table[p, s] for p in range(50) for s in range(4)}
        found = paired_bootstrap(list(mean_by_prompt(values).values()), resamples=1000, seed=run)
        hits += found.low <= 0.3 <= found.high
        pooled = paired_bootstrap(table.ravel(), resamples=300, seed=run)
        pooled_hits += pooled.low <= 0.3 <= pooled.high
    assert 0.92 <= hits / runs <= 0.98
    assert pooled_hits / runs < 0.85


def test_bootstrap_is_repeatable_and_agrees_with_the_t_interval() -> None:
    values = np.random.default_rng(1).normal(0.5, 1, 60)
    found = paired_bootstrap(values)
    assert found == paired_bootstrap(values)
    assert found != paired_bootstrap(values, seed=1)
    exact = stats.t.interval(0.95, 59, values.mean(), values.std(ddof=1) / np.sqrt(60))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(exact, abs=0.03)
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.01)


def test_too_few_prompts_have_no_interval() -> None:
    assert paired_bootstrap([0.4]) == Interval(0.4, -np.inf, np.inf, 1.0, 1)
    assert paired_bootstrap([]).n == 0
    with pytest.raises(ValueError, match="finite"):
        paired_bootstrap([0.1, float("nan")])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30), st.floats(-5, 5), st.floats(0.1, 5))
def test_interval_moves_and_scales_with_the_data(values: list[float], shift: float, scale: float) -> None:
    first = paired_bootstrap(values, resamples=200)
    second = paired_bootstrap(np.asarray(values) * scale + shift, resamples=200)
    assert first.low <= first.mean + 1e-9 and first.mean - 1e-9 <= first.high
    assert second.low == pytest.approx(first.low * scale + shift, abs=1e-6)
    assert second.high == pytest.approx(first.high * scale + shift, abs=1e-6)


def test_seeds_are_averaged_within_a_prompt() -> None:
    assert mean_by_prompt({("b", 0): 1.0, ("a", 0): 5.0, ("b", 1): 3.0}) == {"b": 2.0, "a": 5.0}


def test_holm_known_answer() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_win_rate_counts_ties_as_half() -> None:
    found = win_rate([1.0, 0.0, -1.0, 2.0])
    assert (found.wins, found.ties, found.losses, found.rate) == (2, 1, 1, 0.625)
    assert np.isnan(win_rate([]).rate)


@pytest.mark.parametrize(
    ("base", "tuned", "same"), [(1, 0.8, True), (1, 0.79, False), (1, 1.26, False), (0, 0, True), (0, 1, False)]
)
def test_motion_matching(base: float, tuned: float, same: bool) -> None:
    assert motion_matched(base, tuned) is same


def test_non_inferiority_looks_at_the_bad_end() -> None:
    interval = Interval(-0.01, -0.04, 0.02, 0.5, 50)
    assert non_inferiority(interval, 0.05, higher_is_better=True).holds
    assert not non_inferiority(interval, 0.03, higher_is_better=True).holds
    assert non_inferiority(interval, 0.03, higher_is_better=False).holds


def test_spearman_agrees_with_scipy_on_ties() -> None:
    rng = np.random.default_rng(2)
    for _ in range(5):
        a, b = rng.integers(0, 5, 40), rng.integers(0, 5, 40)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert np.isnan(spearman([1, 2], [1, 2]))
    with pytest.raises(ValueError, match="one length"):
        spearman([1, 2, 3], [1, 2])


def test_within_group_spearman_ignores_differences_between_groups() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(20), 6)
    hardness = rng.normal(0, 10, 20)[groups]  # shared by both: pooled ranks agree by prompt alone
    a, b = hardness + rng.normal(size=120), hardness + rng.normal(size=120)
    assert spearman(a, b) > 0.9
    assert abs(within_group_spearman(a, b, groups.tolist())) < 0.25
    assert within_group_spearman(a, 3 * a + 1, groups.tolist()) == pytest.approx(1)
    assert np.isnan(within_group_spearman([1, 2], [1, 2], ["x", "y"]))
