"""The tables of a judgement: all predictors together, per layer, gains over a reference, costs; as frames, Markdown and for a screen."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table

from experiments.findings import Findings
from experiments.intervals import GROUP, intervals, paired_gains
from predictors.evaluation import quality

ON_SCREEN = (
    "recall",
    "interval",
    "recall_gain",
    "exact_set",
    "weight_mass",
)  # beside names, costs and the first cache's cold recall


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
    return "\n".join(f"**{view.title}**\n\n{_markdown(view)}" for view in _views(tables, top_k, caches))


def for_terminal(tables: Tables, top_k: int, caches: list[str]) -> Group:
    """The same with the columns that most ask for, so that they fit."""
    kept = {"predictor", "lookahead", *ON_SCREEN, f"cold_recall_{caches[0]}", *tables.cost.columns}
    return Group(*(_rich(view.narrowed(kept)) for view in _views(tables, top_k, caches)))


@dataclass(frozen=True)
class View:
    """A table as people read it."""

    title: str
    table: pd.DataFrame
    columns: dict[str, tuple[str, str]]  # column -> its heading and how its numbers are written, "" for text

    def narrowed(self, kept: Collection[str]) -> View:
        """Only the columns of `kept`."""
        return replace(self, columns={name: self.columns[name] for name in self.columns if name in kept})


def _views(tables: Tables, top_k: int, caches: list[str]) -> Iterator[View]:
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
    for (split, phase), rows in table.groupby(["split", "phase"], sort=False):
        yield View(f"{split}, {phase}, {int(rows['n_documents'].max())} documents", rows, columns)
    numbers = {
        "predictor": ("predictor", ""),
        "parameters": ("parameters", "{:,}"),
        "flops": ("FLOPs", "{:,.0f}"),
        "call_us": ("µs, median", "{:.0f}"),
        "call_us_p95": ("µs, p95", "{:.0f}"),
    }
    yield View("Cost of a layer call with one token", tables.cost, numbers)


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


def _markdown(view: View) -> str:
    headings, forms = zip(*view.columns.values(), strict=True)
    lines = [headings, ["---:" if form else "---" for form in forms], *_cells(view)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _rich(view: View) -> Table:
    table = Table(title=view.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading, form in view.columns.values():
        table.add_column(heading, justify="right" if form else "left", no_wrap=not form, overflow="fold")
    for line in _cells(view):
        table.add_row(*line)
    return table


def _cells(view: View) -> list[list[str]]:
    return [[_cell(row[column], form) for column, (_, form) in view.columns.items()] for row in view.table.to_dict("records")]


def _cell(value: object, form: str) -> str:
    if isinstance(value, float) and np.isnan(value):
        return "–"
    return form.format(value) if form else str(value)
