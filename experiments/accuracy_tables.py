"""The tables of a judgement: all predictors together, per layer, gains over a reference, costs; as frames and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.findings import Findings
from experiments.intervals import GROUP, intervals, paired_gains
from predictors.evaluation import quality


@dataclass
class Tables:
    """One row per predictor, split, phase and lookahead, and finer or coarser where the name says so."""

    accuracy: pd.DataFrame
    per_layer: pd.DataFrame
    gain: pd.DataFrame
    cost: pd.DataFrame  # one row per predictor

    def named(self) -> dict[str, pd.DataFrame]:
        """By the names of their files."""
        return {"accuracy": self.accuracy, "per_layer": self.per_layer, "gain": self.gain, "cost": self.cost}


def tables_of(found: dict[str, Findings], caches: list[str], reference: str, n_samples: int, seed: int) -> Tables:
    """All tables; the first of `caches` gives the counts that do not depend on a cache."""
    counts = {cache: pd.concat([f.counts[cache] for f in found.values()], ignore_index=True) for cache in caches}
    main = counts[caches[0]]
    return Tables(
        accuracy=_accuracy(counts, found, n_samples, seed),
        per_layer=rates(main, [*GROUP, "layer"]),
        gain=paired_gains(main, reference, n_samples, seed),
        cost=pd.DataFrame([f.cost for f in found.values()]),
    )


def rates(counts: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """`predictors.evaluation.quality` of `counts`, with PreScope's lenient precision under its own name, and the family."""
    table = quality(counts, by)
    width = lenient_width(int(counts["top_k"].iloc[0]))
    families = [family_of(label) for label in table["predictor"]]
    return table.assign(prescope_precision=table[f"precision_{width}"], family=families)


def lenient_width(top_k: int) -> int:
    """How many guesses PreScope's "top-4 inside the true top-6" looks at, scaled to a model of `top_k`."""
    return max(1, round(top_k * 4 / 6))


def family_of(label: str) -> str:
    """The label without lookahead and weights, under which several distances are one line in a picture."""
    return " ".join(part for part in label.split() if not part.startswith(("lookahead=", "weights=")))


def as_markdown(tables: Tables, top_k: int, caches: list[str]) -> str:
    """The comparison: a table per split and phase, then costs. Intervals are 95 %, by bootstrap over documents."""
    percent = "{:.1%}"
    columns = {
        "predictor": ("predictor", ""),
        "lookahead": ("d", "{:.0f}"),
        "coverage": ("coverage", percent),
        "recall": (f"recall@{top_k}", percent),
        "interval": ("95 %", ""),
        "recall_gain": ("gain", "{:+.1%}"),
        f"recall_plus_{top_k}": (f"recall@{2 * top_k}", percent),
        "prescope_precision": ("PreScope's precision", percent),
        "exact_set": ("exact set", percent),
        "at_least_half": ("at least half", percent),
        "weight_mass": ("weight mass", percent),
        **{f"cold_recall_{cache}": (f"cold, {cache}", percent) for cache in caches},
        "calibration_error": ("ECE", "{:.3f}"),
    }
    ends = [_range(low, high) for low, high in tables.accuracy[["recall_low", "recall_high"]].to_numpy()]
    table = tables.accuracy.assign(interval=ends).merge(tables.gain[[*GROUP, "recall_gain"]], on=GROUP, how="left")
    parts = []
    for (split, phase), rows in table.groupby(["split", "phase"], sort=False):
        parts += [f"**{split}, {phase}**, {int(rows['n_documents'].max())} documents\n", _markdown(rows, columns)]
    numbers = {
        "predictor": ("predictor", ""),
        "parameters": ("parameters", "{:,}"),
        "flops": ("FLOPs", "{:,.0f}"),
        "call_us": ("µs, median", "{:.0f}"),
        "call_us_p95": ("µs, p95", "{:.0f}"),
    }
    return "\n".join([*parts, "**Cost** of a layer call with one token\n", _markdown(tables.cost, numbers)])


def _accuracy(counts: dict[str, pd.DataFrame], found: dict[str, Findings], n_samples: int, seed: int) -> pd.DataFrame:
    """Rates with intervals; cold figures of every cache, named after it; calibration error."""
    main, *_ = counts.values()
    cold = ["cold_recall", "cold_precision"]
    table = rates(main, GROUP).drop(columns=cold).merge(intervals(main, "recall", n_samples, seed), on=GROUP)
    for cache, rows in counts.items():
        of_cache = quality(rows, GROUP)[[*GROUP, *cold]].merge(
            intervals(rows, "cold_recall", n_samples, seed).drop(columns="n_documents"), on=GROUP
        )
        names = {column: f"{column.removesuffix(end)}_{cache}{end}" for column, end in _cold_columns()}
        table = table.merge(of_cache.rename(columns=names), on=GROUP)
    errors = {(label, split): c.expected_calibration_error for label, f in found.items() for split, c in f.curves.items()}
    pairs = zip(table["predictor"], table["split"], strict=True)
    return table.assign(calibration_error=[errors.get(pair, np.nan) for pair in pairs])


def _cold_columns() -> list[tuple[str, str]]:
    """(column, its ending after the cache's name)."""
    return [("cold_recall", ""), ("cold_precision", ""), ("cold_recall_low", "_low"), ("cold_recall_high", "_high")]


def _range(low: float, high: float) -> str:
    return "–" if np.isnan(low) else f"{100 * low:.1f}–{100 * high:.1f}"


def _markdown(table: pd.DataFrame, columns: dict[str, tuple[str, str]]) -> str:
    """`columns`: column -> its heading and how its numbers are written, "" for text."""
    lines = [[heading for heading, _ in columns.values()], ["---:" if form else "---" for _, form in columns.values()]]
    for row in table.to_dict("records"):
        lines.append([_cell(row[column], form) for column, (_, form) in columns.items()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: object, form: str) -> str:
    if isinstance(value, float) and np.isnan(value):
        return "–"
    return form.format(value) if form else str(value)
