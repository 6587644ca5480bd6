"""Confidence intervals of recall by bootstrap over documents, for one predictor and for the gain of one over another.

Documents, not tokens, are resampled: tokens of one document are alike, and an interval that took them for independent would be
far too narrow.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

GROUP = ["predictor", "split", "phase", "lookahead"]
LEVEL = 0.95
PARTS = {"recall": ("right", "wanted"), "cold_recall": ("cold_found", "cold")}  # metric -> its numerator and denominator


def intervals(counts: pd.DataFrame, metric: str, n_samples: int, seed: int) -> pd.DataFrame:
    """95 % intervals of `metric` ("recall" or "cold_recall") per GROUP; documents are drawn with replacement.

    Args:
        counts: rows of `count_guesses` with the columns of GROUP and `document`, for one cache.

    Returns:
        a row per group, with `<metric>_low`, `<metric>_high` (NaN where nothing was to be found) and `n_documents`.
    """
    rows = []
    for group, part in _with_right(counts).groupby(GROUP, sort=False):
        sums = part.groupby("document")[list(PARTS[metric])].sum().to_numpy(float)
        totals = _drawn(sums, n_samples, seed)
        low, high = _ends(totals[:, 0], totals[:, 1])
        figures = {f"{metric}_low": low, f"{metric}_high": high, "n_documents": len(sums)}
        rows.append(dict(zip(GROUP, group, strict=True)) | figures)
    return pd.DataFrame(rows)


def paired_gains(counts: pd.DataFrame, reference: str, n_samples: int, seed: int) -> pd.DataFrame:
    """Recall of each predictor less the reference's, on the same documents and layers, with paired intervals.

    Only (document, layer) pairs that both predict are compared, per split, phase and lookahead.

    Returns:
        a row per group that has such pairs: `reference`, `recall_gain`, `recall_gain_low`, `recall_gain_high`.
    """
    keys = ["split", "phase", "lookahead", "document", "layer"]
    table = _with_right(counts)[["predictor", *keys, "right", "wanted"]]
    base = table[table["predictor"] == reference].drop(columns="predictor")
    both = table[table["predictor"] != reference].merge(base, on=keys, suffixes=("", "_base"))
    both = both[(both["wanted"] > 0) & (both["wanted_base"] > 0)]
    rows = []
    for group, part in both.groupby(GROUP, sort=False):
        sums = part.groupby("document")[["right", "wanted", "right_base", "wanted_base"]].sum().to_numpy(float)
        low, high = np.quantile(_gain(_drawn(sums, n_samples, seed)), _tails())
        figures = {"recall_gain": float(_gain(sums.sum(axis=0))), "recall_gain_low": low, "recall_gain_high": high}
        rows.append(dict(zip(GROUP, group, strict=True)) | {"reference": reference} | figures)
    return pd.DataFrame(rows, columns=[*GROUP, "reference", "recall_gain", "recall_gain_low", "recall_gain_high"])


def _with_right(counts: pd.DataFrame) -> pd.DataFrame:
    """Adds `right`, the true experts among the k best guesses, and `wanted`, all true experts of covered rows."""
    top_k = int(counts["top_k"].iloc[0])
    right = counts[[f"hits_{rank}" for rank in range(top_k)]].sum(axis=1)
    return counts.assign(right=right, wanted=counts["covered"] * top_k)


def _drawn(sums: np.ndarray, n_samples: int, seed: int) -> np.ndarray:
    """[n_samples, columns]: totals over as many documents as there are, drawn with replacement from `sums` [documents, columns]."""
    chosen = np.random.default_rng(seed).integers(len(sums), size=(n_samples, len(sums)))
    totals: np.ndarray = sums[chosen].sum(axis=1)
    return totals


def _gain(totals: np.ndarray) -> np.ndarray:
    right, wanted, right_base, wanted_base = np.moveaxis(totals, -1, 0)
    gain: np.ndarray = right / wanted - right_base / wanted_base
    return gain


def _ends(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    measured = denominators > 0
    if not measured.any():
        return np.nan, np.nan
    low, high = np.quantile(numerators[measured] / denominators[measured], _tails())
    return float(low), float(high)


def _tails() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2
