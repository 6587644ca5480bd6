"""Spreads, paired ratios and shares of the gain, against numbers worked out by hand and properties that must hold."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.statistics import is_difference, paired_ratio, share_of_gain, spread

rates = st.floats(0.1, 1e4)
repeats = st.lists(rates, min_size=1, max_size=9)


@given(repeats, st.integers(0, 3))
def test_spread_is_median_and_range_of_what_was_measured(values: list[float], n_missing: int) -> None:
    got = spread([*values, *[math.nan] * n_missing])
    assert (got.low, got.high, got.n) == (min(values), max(values), len(values))
    assert got.median == pytest.approx(statistics.median(values))


def test_nothing_measured_is_nan_not_zero() -> None:
    got = spread([math.nan])
    assert got.n == 0
    assert all(math.isnan(v) for v in (got.median, got.low, got.high))


@given(st.lists(st.tuples(rates, st.floats(0.25, 4.0)), min_size=3, max_size=7), st.floats(1.05, 3.0))
def test_drift_that_hits_both_arms_cancels(base_and_drift: list[tuple[float, float]], speedup: float) -> None:
    baseline = [rate * drift for rate, drift in base_and_drift]
    faster = [value * speedup for value in baseline]
    ratio = paired_ratio(faster, baseline)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((speedup, speedup, speedup))
    assert is_difference(faster, baseline)
    assert is_difference(baseline, faster)


@given(repeats)
def test_an_arm_does_not_differ_from_itself(values: list[float]) -> None:
    assert not is_difference(values, values)


@pytest.mark.parametrize(
    ("ratios", "differs"),
    [
        ([1.10, 1.11, 1.09], True),
        ([0.90, 0.91, 0.89], True),
        ([1.10, 0.99, 1.20], False),  # on both sides of 1
        ([1.01, 1.02, 1.90], True),  # always faster, if not always by as much
        ([1.00, 1.10, 1.20], False),
        ([1.10, 1.11], False),  # two repeats tell nothing
        ([1.10, 1.11, math.nan], False),
    ],
)
def test_a_difference_inside_the_spread_is_no_difference(ratios: list[float], differs: bool) -> None:
    baseline = [50.0 + i for i in range(len(ratios))]
    assert is_difference([r * b for r, b in zip(ratios, baseline, strict=True)], baseline) is differs


def test_share_of_gain_per_repeat() -> None:
    slru, oracle = [10.0, 20.0, 10.0], [20.0, 40.0, 21.0]
    got = share_of_gain([16.0, 32.0, 16.6], slru, oracle)
    assert (got.median, got.low, got.high) == pytest.approx((0.6, 0.6, 0.6))
    assert share_of_gain(slru, slru, oracle).median == 0.0
    assert share_of_gain(oracle, slru, oracle).median == 1.0
    assert share_of_gain([9.0, 18.0, 9.0], slru, oracle).high < 0


@pytest.mark.parametrize("oracle", [[10.0, 20.1, 9.9], [5.0, 10.0, 5.0]])
def test_a_share_of_no_gain_is_not_measured(oracle: list[float]) -> None:
    got = share_of_gain([11.0, 22.0, 11.0], [10.0, 20.0, 10.0], oracle)
    assert got.n == 0
    assert math.isnan(got.median)


def test_unequal_repeats_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="3 repeats cannot be paired with 2"):
        paired_ratio([1.0, 1.0, 1.0], [1.0, 1.0])
