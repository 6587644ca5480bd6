"""What repeats say: medians, spreads, paired comparisons. Repeat i of one arm ran beside repeat i of every other arm.

With the few repeats of a run (3 to 10) the spread is the full range, which hides nothing and assumes no distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_REPEATS = 3  # below that a range says nothing about the next repeat


@dataclass(frozen=True)
class Spread:
    """Median and full range of n repeats; all NaN, with n = 0, where nothing was measured."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float] | np.ndarray) -> Spread:
    """Median, minimum and maximum of the repeats that were measured (not NaN)."""
    measured = np.asarray(values, dtype=float)
    measured = measured[~np.isnan(measured)]
    if not len(measured):
        return Spread(np.nan, np.nan, np.nan, 0)
    return Spread(float(np.median(measured)), float(measured.min()), float(measured.max()), len(measured))


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> Spread:
    """values[i] / baseline[i] over the repeats: drift of the machine hits both alike and cancels.

    Raises:
        ValueError: the two were not repeated equally often.
    """
    numerator, denominator = _paired(values, baseline)
    return spread(numerator / np.where(denominator > 0, denominator, np.nan))


def is_difference(values: Sequence[float], baseline: Sequence[float], *, exact: bool = False) -> bool:
    """Whether 1 lies outside the range of the paired ratios: in every repeat the same arm was the faster one.

    Between equal arms chance alone does that in 2 of 2^n cases (n = 3: 1 in 4, n = 5: 1 in 16); fewer than 3 pairs never tell.

    Args:
        exact: the figures are no measurements, and come out the same each time: one pair tells.
    """
    ratio = paired_ratio(values, baseline)
    return ratio.n >= (1 if exact else MIN_REPEATS) and not ratio.low <= 1 <= ratio.high


def share_of_gain(
    values: Sequence[float], baseline: Sequence[float], ceiling: Sequence[float], *, exact: bool = False
) -> Spread:
    """(values[i] - baseline[i]) / (ceiling[i] - baseline[i]): the share of the ceiling's gain that was recovered.

    0 = no better than the baseline, 1 = as good as the ceiling; below 0 it loses. Not measured (NaN) where the ceiling
    itself is no different from the baseline: a share of noise is noise. `exact` as for `is_difference`.
    """
    value, base = _paired(values, baseline)
    top, _ = _paired(ceiling, baseline)
    if not is_difference(ceiling, baseline, exact=exact) or paired_ratio(ceiling, baseline).low < 1:
        return spread([])
    return spread((value - base) / (top - base))


def _paired(values: Sequence[float], baseline: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(values) != len(baseline):
        raise ValueError(f"{len(values)} repeats cannot be paired with {len(baseline)}")
    return np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
