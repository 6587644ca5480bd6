"""Pictures of a judgement of predictors, as PNG: recall by layer, by distance, by budget; reliability; cost against recall."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.accuracy_tables import Tables, family_of
from experiments.atomic import replacing
from experiments.plots import ARM_COLOURS, ARM_MARKERS, BOUND_COLOUR, STYLE, Look
from predictors.calibration import Reliability

LINES = ("-", "--", ":")


def draw(tables: Tables, curves: dict[tuple[str, str], Reliability], top_k: int, folder: Path) -> list[Path]:
    """All pictures of a judgement; `curves`: (predictor, split) -> reliability. Returns the files."""
    look_of = looks(list(dict.fromkeys(tables.accuracy["family"])))
    names = ("recall_by_layer", "recall_by_distance", "recall_by_budget", "reliability", "cost_against_recall")
    by_layer, by_distance, by_budget, reliable, cost = images = [folder / f"{name}.png" for name in names]
    recall_by_layer(tables.per_layer, look_of, by_layer, top_k)
    recall_by_distance(tables.accuracy, look_of, by_distance, top_k)
    recall_by_budget(tables.accuracy, look_of, by_budget, top_k)
    reliability_diagram(curves, look_of, reliable)
    cost_against_recall(tables.accuracy, tables.cost, look_of, cost, top_k)
    return images


def looks(predictors: Sequence[str]) -> dict[str, Look]:
    """One colour, marker and line per predictor, the same in every picture; lines change where the colours begin again."""
    markers, n_colours = cycle(ARM_MARKERS), len(ARM_COLOURS)
    return {
        name: Look(ARM_COLOURS[i % n_colours], next(markers), LINES[i // n_colours % len(LINES)])
        for i, name in enumerate(predictors)
    }


def recall_by_layer(per_layer: pd.DataFrame, look_of: dict[str, Look], path: Path, top_k: int) -> None:
    """Recall@k of each target layer when decoding, a panel per split; each predictor at its nearest lookahead."""
    table = nearest(per_layer[per_layer["phase"] == "decode"])
    _panels(table, look_of, path, "layer", "recall", "target MoE layer", f"recall@{top_k}, decode (%)")


def recall_by_distance(overall: pd.DataFrame, look_of: dict[str, Look], path: Path, top_k: int) -> None:
    """Recall@k against lookahead; a predictor that was judged at several distances, under one name each, is one line."""
    table = overall[overall["phase"] == "decode"]
    _panels(table, look_of, path, "lookahead", "recall", "lookahead (MoE layers)", f"recall@{top_k}, decode (%)")


def recall_by_budget(overall: pd.DataFrame, look_of: dict[str, Look], path: Path, top_k: int) -> None:
    """Recall@k+m against the number of guesses; each predictor at its nearest lookahead."""
    table = nearest(overall[overall["phase"] == "decode"])
    long = table.melt(["family", "split"], [f"recall_plus_{m}" for m in range(top_k + 1)], "budget", "found")
    long["budget"] = long["budget"].str.removeprefix("recall_plus_").astype(int) + top_k
    _panels(long, look_of, path, "budget", "found", "guesses k + m", "true experts among them, decode (%)")


def reliability_diagram(curves: dict[tuple[str, str], Reliability], look_of: dict[str, Look], path: Path) -> None:
    """Observed frequency against predicted probability, a panel per split; the diagonal is perfect."""
    splits = list(dict.fromkeys(split for _, split in curves))
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4 * len(splits) + 2, 4.6), layout="constrained")
        for axes, split in zip(_row(figure, len(splits)), splits, strict=True):
            axes.plot([0, 1], [0, 1], color=BOUND_COLOUR, ls=":")
            for family, curve in _first_of_family(curves, split).items():
                filled = curve.count > 0
                _line(axes, curve.predicted[filled].tolist(), curve.observed[filled].tolist(), look_of[family])
            axes.set_title(split, loc="left")
            axes.set_xlabel("predicted P(used)")
            axes.set_ylabel("observed frequency")
        _legend(figure, look_of, {family_of(label) for label, _ in curves})
        _save(figure, path)


def cost_against_recall(overall: pd.DataFrame, costs: pd.DataFrame, look_of: dict[str, Look], path: Path, top_k: int) -> None:
    """Recall@k when decoding against the time of a call, a panel per split."""
    table = nearest(overall[overall["phase"] == "decode"].merge(costs, on="predictor").dropna(subset=["call_us"]))
    _panels(table, look_of, path, "call_us", "recall", "time per layer call, one token (µs)", f"recall@{top_k}, decode (%)")


def _first_of_family(curves: dict[tuple[str, str], Reliability], split: str) -> dict[str, Reliability]:
    """One curve per family: of the distance that was judged first."""
    found: dict[str, Reliability] = {}
    for (label, where), curve in curves.items():
        if where == split:
            found.setdefault(family_of(label), curve)
    return found


def nearest(table: pd.DataFrame) -> pd.DataFrame:
    """Rows at the smallest lookahead of each family."""
    return table[table["lookahead"] == table.groupby("family")["lookahead"].transform("min")]


def _panels(table: pd.DataFrame, look_of: dict[str, Look], path: Path, x: str, y: str, x_label: str, y_label: str) -> None:
    splits = list(dict.fromkeys(table["split"]))
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4 * len(splits) + 2, 4.6), layout="constrained")
        for axes, split in zip(_row(figure, len(splits)), splits, strict=True):
            for name, look in look_of.items():
                rows = table[(table["split"] == split) & (table["family"] == name)].sort_values(x)
                if len(rows):
                    _line(axes, rows[x].tolist(), (100 * rows[y]).tolist(), look)
            axes.set_title(split, loc="left")
            axes.set_xlabel(x_label)
            axes.set_ylim(0, 102)
            if x == "call_us":
                axes.set_xscale("log")
            else:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylabel(y_label)
        _legend(figure, look_of, set(table["family"]))
        _save(figure, path)


def _row(figure: Figure, n: int) -> list[Axes]:
    return list(figure.subplots(1, max(n, 1), squeeze=False, sharey=True)[0])[:n]


def _line(axes: Axes, x: list[float], y: list[float], look: Look) -> None:
    axes.plot(x, y, color=look.colour, marker=look.marker, ls=look.line, lw=1.8, ms=5)


def _legend(figure: Figure, look_of: dict[str, Look], shown: set[str]) -> None:
    handles = [
        Line2D([], [], lw=1.8, color=look.colour, marker=look.marker, ls=look.line, label=name)
        for name, look in look_of.items()
        if name in shown
    ]
    figure.legend(handles=handles, loc="outside right upper", handlelength=2.8)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as aside:
        figure.savefig(aside, format="png")
