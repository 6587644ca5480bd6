"""How good guesses were, counted against what the routers then selected. Every formula is in docs/method.md.

`count_guesses` turns a routing trace into exact counts per phase, lookahead and layer; `quality` turns counts into rates,
pooled over whatever the rows are grouped by. Pooling counts, never averages of averages, keeps the two consistent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:  # counting needs no torch
    from prefetch.trace import RoutingTrace

PHASES = ("prefill", "decode")  # in the order of RoutingTrace.phase
PER_LAYER = ("phase", "lookahead", "layer")
OVERALL = ("phase", "lookahead")
ROWS_AT_ONCE = 1 << 16  # tokens compared at a time: bounds memory at about rows * k * guesses bytes


def count_guesses(trace: RoutingTrace) -> pd.DataFrame:
    """Counts of right and wrong guesses, one row per (phase, lookahead, layer) that has tokens.

    Columns, besides those three and `top_k`:
        rows: tokens of the phase; `covered`: those of them with at least one guess. All others are over covered rows only.
        hits_<r>: guesses ranked r-th (from 0) that were right; `made_<r>`: guesses ranked r-th.
        exact, at_least_half: rows whose k best guesses hold all, or at least k / 2, of the true experts.
        mass, mass_found: routing weight of the true experts, and of those among the k best guesses.
        cold, cold_found: true experts not resident when predicted, and those of them among the k best guesses.
        cold_guesses, cold_guesses_right: guesses among the k best that were not resident, and those that were right.
    """
    counts = []
    for phase, name in enumerate(PHASES):
        rows = np.flatnonzero(trace.phase == phase)
        if not len(rows):
            continue
        for lookahead in sorted(trace.guesses):
            for layer in range(trace.n_layers):
                labels = {"phase": name, "lookahead": lookahead, "layer": layer, "top_k": trace.top_k}
                counts.append(labels | _count_layer(trace, rows, lookahead, layer))
    return pd.DataFrame(counts)


def quality(counts: pd.DataFrame, by: Sequence[str] = OVERALL) -> pd.DataFrame:
    """Rates from `count_guesses`, one row per group of `by` (`PER_LAYER` or `OVERALL`); NaN = nothing to count.

    Columns, besides those of `by`:
        rows, coverage: (token, layer) pairs, and the share of them for which anything was guessed.
        recall: recall@k, over covered pairs. `recall_all` = recall * coverage counts pairs without a guess as not predicted.
        recall_plus_<m>: recall@k+m for m = 0..k, as far as guesses were recorded.
        precision_<m>: of the m best guesses, the share that was right, for m = 1 up to the recorded width.
        exact_set, at_least_half, weight_mass, cold_recall, cold_precision: see `count_guesses`, over covered pairs.
    """
    if counts.empty:
        return pd.DataFrame(columns=[*by, "rows", "coverage", "recall", "recall_all"])
    sums = counts.assign(wanted=counts["covered"] * counts["top_k"]).groupby(list(by), sort=False).sum(numeric_only=True)
    top_k = int(counts["top_k"].iloc[0])
    width = sum(column.startswith("hits_") for column in counts.columns)
    hits = sums[[f"hits_{r}" for r in range(width)]].cumsum(axis=1)
    made = sums[[f"made_{r}" for r in range(width)]].cumsum(axis=1)
    reach = min(top_k, width) - 1  # the last of the k best guesses, where fewer are recorded the last of those

    rates = {"rows": sums["rows"], "coverage": sums["covered"] / sums["rows"]}
    rates["recall"] = hits[f"hits_{reach}"] / sums["wanted"]
    rates["recall_all"] = hits[f"hits_{reach}"] / (sums["rows"] * top_k)
    for m in range(max(0, min(top_k, width - top_k)) + 1):
        rates[f"recall_plus_{m}"] = hits[f"hits_{min(reach + m, width - 1)}"] / sums["wanted"]
    for m in range(1, width + 1):
        rates[f"precision_{m}"] = hits[f"hits_{m - 1}"] / made[f"made_{m - 1}"]
    rates["exact_set"] = sums["exact"] / sums["covered"]
    rates["at_least_half"] = sums["at_least_half"] / sums["covered"]
    rates["weight_mass"] = sums["mass_found"] / sums["mass"]
    rates["cold_recall"] = sums["cold_found"] / sums["cold"]
    rates["cold_precision"] = sums["cold_guesses_right"] / sums["cold_guesses"]
    return pd.DataFrame(rates).reset_index()


def _count_layer(trace: RoutingTrace, rows: np.ndarray, lookahead: int, layer: int) -> dict[str, float]:
    """The counts of one layer over `rows`, a block of tokens at a time."""
    totals: dict[str, float] = {}
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[start : start + ROWS_AT_ONCE]
        counted = _count_block(
            trace.topk_ids[block, layer].astype(np.int16),
            trace.topk_weights[block, layer],
            trace.guesses[lookahead][block, layer],
            trace.resident[lookahead][block, layer],
        )
        totals = {name: totals.get(name, 0) + value for name, value in counted.items()}
    return totals


def _count_block(true: np.ndarray, weights: np.ndarray, guesses: np.ndarray, resident: np.ndarray) -> dict[str, float]:
    """Counts over T tokens: `true` and `weights` [T, k], `guesses` [T, m] (-1 = none), `resident` [T, E]."""
    n_rows, top_k = true.shape
    made = guesses >= 0
    covered = made.any(axis=1)
    true, weights, guesses, resident, made = (a[covered] for a in (true, weights, guesses, resident, made))

    same = guesses[:, :, None] == true[:, None, :]  # [T, m, k]; no true id is -1
    right = same.any(axis=2)
    found = same[:, :top_k].any(axis=1)  # [T, k], true experts among the k best guesses
    n_found = found.sum(axis=1)
    cold = ~np.take_along_axis(resident, true.astype(np.intp), axis=1)
    best, best_made = guesses[:, :top_k].clip(0).astype(np.intp), made[:, :top_k]
    cold_guess = best_made & ~np.take_along_axis(resident, best, axis=1)

    counts = {"rows": n_rows, "covered": covered.sum()}
    counts |= {f"hits_{r}": n for r, n in enumerate(right.sum(axis=0))}
    counts |= {f"made_{r}": n for r, n in enumerate(made.sum(axis=0))}
    counts |= {"exact": (n_found == top_k).sum(), "at_least_half": (2 * n_found >= top_k).sum()}
    counts |= {"mass": weights.sum(dtype=np.float64), "mass_found": weights[found].sum(dtype=np.float64)}
    counts |= {"cold": cold.sum(), "cold_found": (cold & found).sum()}
    counts |= {"cold_guesses": cold_guess.sum(), "cold_guesses_right": (cold_guess & right[:, :top_k]).sum()}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in counts.items()}
