"""Bootstrap intervals against a brute-force resampling of documents, and against a population whose truth is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.intervals import GROUP, intervals, paired_gains


def counts_of(predictor: str, right_share: list[float], wanted: int = 100) -> pd.DataFrame:
    """One document per share: of `wanted` true experts (k = 2, one hit column each), that share was found."""
    rows = []
    for document, share in enumerate(right_share):
        found = round(share * wanted)
        rows.append(
            {
                "predictor": predictor, "split": "held_out", "phase": "decode", "lookahead": 1, "layer": 1, "top_k": 2,
                "document": f"d{document}", "rows": wanted // 2, "covered": wanted // 2,
                "hits_0": found // 2, "hits_1": found - found // 2, "cold": wanted, "cold_found": found // 2,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def test_an_interval_is_that_of_resampled_documents() -> None:
    shares = [0.1, 0.5, 0.6, 0.9]
    (row,) = intervals(counts_of("a", shares), "recall", 4000, seed=1).to_dict("records")
    random = np.random.default_rng(99)
    means = [np.mean(random.choice(shares, len(shares))) for _ in range(4000)]
    assert row["n_documents"] == 4
    assert row["recall_low"] == pytest.approx(np.quantile(means, 0.025), abs=0.03)
    assert row["recall_high"] == pytest.approx(np.quantile(means, 0.975), abs=0.03)


def test_long_documents_weigh_more() -> None:
    table = pd.concat([counts_of("a", [1.0], wanted=1000), counts_of("a", [1.0, 0.0])[1:]])
    (row,) = intervals(table, "recall", 500, seed=0).to_dict("records")
    assert row["recall_high"] == 1.0 and row["recall_low"] == 0.0
    totals = {0: 0.0, 1: 1000 / 1100, 2: 1.0}  # by how often the long one is drawn
    inner = intervals(table, "cold_recall", 500, seed=0)
    assert inner["cold_recall_high"].item() == pytest.approx(totals[2] / 2)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        shares = random.beta(6, 4, size=30)
        (row,) = intervals(counts_of("a", list(shares), wanted=10_000), "recall", 300, seed).to_dict("records")
        inside += row["recall_low"] <= 0.6 <= row["recall_high"]
    assert 0.88 <= inside / 200 <= 0.99


def test_one_document_has_no_width_and_an_empty_cell_no_interval() -> None:
    table = counts_of("a", [0.5]).assign(cold=0, cold_found=0)
    (recall,) = intervals(table, "recall", 10, 0).to_dict("records")
    (cold,) = intervals(table, "cold_recall", 10, 0).to_dict("records")
    assert recall["recall_low"] == recall["recall_high"] == 0.5
    assert np.isnan(cold["cold_recall_low"]) and np.isnan(cold["cold_recall_high"])


def test_a_gain_is_paired_by_document() -> None:
    shares = [0.1, 0.4, 0.7, 0.9]
    both = pd.concat([counts_of("base", shares), counts_of("better", [share + 0.05 for share in shares])])
    (row,) = paired_gains(both, "base", 500, 0).to_dict("records")
    assert row["predictor"] == "better" and row["reference"] == "base"
    assert row["recall_gain"] == pytest.approx(0.05)
    assert row["recall_gain_low"] == pytest.approx(0.05) and row["recall_gain_high"] == pytest.approx(0.05)


def test_only_layers_that_both_predict_are_compared() -> None:
    base, other = counts_of("base", [0.5, 0.5]), counts_of("other", [0.9, 0.9])
    elsewhere = counts_of("other", [0.0, 0.0]).assign(layer=2)
    (row,) = paired_gains(pd.concat([base, other, elsewhere]), "base", 100, 0).to_dict("records")
    assert row["recall_gain"] == pytest.approx(0.4)
    nothing = paired_gains(pd.concat([base, elsewhere]), "base", 100, 0)
    assert nothing.empty and set(GROUP) <= set(nothing.columns)
