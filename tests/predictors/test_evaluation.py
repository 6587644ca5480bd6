"""Quality metrics against a slow count over Python sets, one token at a time."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as nps
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import predictors.evaluation
from predictors.evaluation import OVERALL, PER_LAYER, count_guesses, quality
from prefetch.trace import RoutingTrace


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    """Small traces with several lookaheads, layers without guesses, short guesses and arbitrary residency."""
    n, n_layers, n_experts = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(2, 7))
    top_k = draw(st.integers(1, min(3, n_experts)))
    width = min(n_experts, draw(st.sampled_from([2 * top_k, top_k, 1])))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def permutations(size: int) -> np.ndarray:
        return np.stack([[random.permutation(n_experts)[:size] for _ in range(n_layers)] for _ in range(n)])

    guesses, resident = {}, {}
    for lookahead in draw(st.sampled_from([(), (1,), (1, 3)])):
        ranked = permutations(width).astype(np.int16)
        made = draw(nps.arrays(np.int64, (n, n_layers), elements=st.integers(0, width)))
        guesses[lookahead] = np.where(np.arange(width) < made[..., None], ranked, -1).astype(np.int16)
        resident[lookahead] = draw(nps.arrays(bool, (n, n_layers, n_experts)))
    step = np.sort(draw(nps.arrays(np.int32, n, elements=st.integers(0, 2))))
    return RoutingTrace(
        sequence=np.zeros(n, np.int32),
        step=step,
        phase=(step > 0).astype(np.uint8),
        token_ids=np.zeros(n, np.int32),
        topk_ids=permutations(top_k).astype(np.uint16),
        topk_weights=random.random((n, n_layers, top_k), np.float32) + np.float32(0.01),
        n_experts=n_experts,
        guesses=guesses,
        resident=resident,
    )


def slow_quality(trace: RoutingTrace, phase: int, lookahead: int, layers: list[int]) -> dict[str, float]:
    """The definitions of docs/method.md, word by word."""
    k, width = trace.top_k, trace.guesses[lookahead].shape[2]
    pairs = covered = exact = half = cold = cold_found = cold_guesses = cold_right = 0
    mass = mass_found = 0.0
    found_in_first, made_in_first = [0] * (width + 1), [0] * (width + 1)
    for n in range(trace.n_tokens):
        for layer in layers:
            if trace.phase[n] != phase:
                continue
            pairs += 1
            true = {int(e) for e in trace.topk_ids[n, layer]}
            weight = {int(e): float(w) for e, w in zip(trace.topk_ids[n, layer], trace.topk_weights[n, layer], strict=True)}
            ranked = [int(e) for e in trace.guesses[lookahead][n, layer] if e >= 0]
            if not ranked:
                continue
            covered += 1
            for m in range(width + 1):
                found_in_first[m] += len(true & set(ranked[:m]))
                made_in_first[m] += len(ranked[:m])
            best = set(ranked[:k])
            absent = {e for e in range(trace.n_experts) if not trace.resident[lookahead][n, layer, e]}
            exact += true <= best
            half += len(true & best) >= k / 2
            mass += sum(weight.values())
            mass_found += sum(weight[e] for e in true & best)
            cold += len(true & absent)
            cold_found += len(true & absent & best)
            cold_guesses += len(best & absent)
            cold_right += len(best & absent & true)
    rates = {
        "rows": pairs,
        "coverage": _ratio(covered, pairs),
        "recall": _ratio(found_in_first[min(k, width)], k * covered),
        "recall_all": _ratio(found_in_first[min(k, width)], k * pairs),
        "exact_set": _ratio(exact, covered),
        "at_least_half": _ratio(half, covered),
        "weight_mass": _ratio(mass_found, mass),
        "cold_recall": _ratio(cold_found, cold),
        "cold_precision": _ratio(cold_right, cold_guesses),
    }
    rates |= {f"precision_{m}": _ratio(found_in_first[m], made_in_first[m]) for m in range(1, width + 1)}
    extra = range(max(0, min(k, width - k)) + 1)
    return rates | {f"recall_plus_{m}": _ratio(found_in_first[min(k + m, width)], k * covered) for m in extra}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def assert_same(row: pd.Series, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name
    assert set(row.index) - set(PER_LAYER) == set(expected)


@given(traces(), st.sampled_from([2, 1 << 16]))
@settings(max_examples=150, deadline=None)
def test_every_metric_equals_a_count_over_sets(trace: RoutingTrace, rows_at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictors.evaluation, "ROWS_AT_ONCE", rows_at_once)
        counts = count_guesses(trace)
    phases = [p for p in (0, 1) if (trace.phase == p).any()]
    per_layer, overall = quality(counts, PER_LAYER), quality(counts, OVERALL)
    assert len(per_layer) == len(phases) * len(trace.guesses) * trace.n_layers
    assert len(overall) == len(phases) * len(trace.guesses)
    for _, row in per_layer.iterrows():
        phase = ("prefill", "decode").index(row["phase"])
        assert_same(row, slow_quality(trace, phase, row["lookahead"], [row["layer"]]))
    for _, row in overall.iterrows():
        phase = ("prefill", "decode").index(row["phase"])
        assert_same(row, slow_quality(trace, phase, row["lookahead"], list(range(trace.n_layers))))


def perfect_trace(n: int, n_layers: int, n_experts: int, top_k: int) -> RoutingTrace:
    """Guesses = truth at every layer but the first, which has none; nothing resident."""
    random = np.random.default_rng(0)
    ids = random.random((n, n_layers, n_experts)).argsort(axis=2)[:, :, : 2 * top_k]
    guesses = ids.astype(np.int16)
    guesses[:, 0] = -1
    step = np.ones(n, np.int32)
    return RoutingTrace(
        sequence=np.zeros(n, np.int32),
        step=step,
        phase=step.astype(np.uint8),
        token_ids=step,
        topk_ids=ids[:, :, :top_k].astype(np.uint16),
        topk_weights=np.full((n, n_layers, top_k), 1 / top_k, np.float32),
        n_experts=n_experts,
        guesses={1: guesses},
        resident={1: np.zeros((n, n_layers, n_experts), bool)},
    )


def test_a_layer_without_guesses_lowers_coverage_and_recall_all_but_not_recall() -> None:
    trace = perfect_trace(n=40, n_layers=4, n_experts=8, top_k=2)
    (overall,) = quality(count_guesses(trace), OVERALL).to_dict("records")
    assert overall["recall"] == overall["exact_set"] == overall["weight_mass"] == overall["cold_recall"] == 1.0
    assert overall["coverage"] == overall["recall_all"] == 0.75
    assert overall["precision_4"] == 0.5  # 2 of the 4 best can be right at most
    first = quality(count_guesses(trace), PER_LAYER).iloc[0]
    assert first["coverage"] == 0.0
    assert math.isnan(first["recall"])


def test_counts_of_many_blocks_add_up() -> None:
    trace = perfect_trace(n=150_000, n_layers=2, n_experts=16, top_k=4)
    (overall,) = quality(count_guesses(trace)).to_dict("records")
    assert overall["rows"] == 300_000
    assert overall["recall_all"] == 0.5


def test_a_trace_without_predictor_has_no_rows() -> None:
    trace = perfect_trace(n=3, n_layers=2, n_experts=4, top_k=1)
    trace.guesses, trace.resident = {}, {}
    assert quality(count_guesses(trace)).empty
