"""Pictures of a comparison, as PNG. One order and one colour per arm everywhere; bounds are grey or dashed lines.

The palette is Okabe and Ito's, which colour-blind readers can tell apart; markers and line styles repeat what colours say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.atomic import replacing
from experiments.results import BOUND, Results, legend_order
from experiments.statistics import spread

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
ARM_COLOURS = (BLACK, ORANGE, SKY, GREEN, VERMILLION, PURPLE, BLUE)  # yellow lines are too faint on white
ARM_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BOUND_COLOUR = "#707070"
BOUND_DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 3)))
PART_COLOURS = {"dense": "#BBBBBB", "expert": BLUE, "predictor": GREEN, "overhead": YELLOW, "stall": VERMILLION}
PART_LABELS = {
    "dense": "outside MoE layers",
    "expert": "expert compute",
    "predictor": "predictor and planner",
    "overhead": "runtime overhead",
    "stall": "stall",
}
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 150,
}


class Look(NamedTuple):
    """How one arm is drawn in every picture."""

    colour: str
    marker: str
    line: str | tuple[float, tuple[float, ...]]


def looks(runs: Sequence[Results]) -> dict[str, Look]:
    """The look of every arm of `runs`, in legend order. Bounds are grey and dashed."""
    bounds = {name for run in runs for name, arm in run.arms.items() if arm.role == BOUND}
    found, n_bounds = {}, 0
    for i, name in enumerate(legend_order(runs)):
        if name in bounds:
            found[name] = Look(BOUND_COLOUR, "", BOUND_DASHES[n_bounds % len(BOUND_DASHES)])
            n_bounds += 1
        else:
            found[name] = Look(ARM_COLOURS[i % len(ARM_COLOURS)], ARM_MARKERS[i % len(ARM_MARKERS)], "-")
    return found


def tokens_per_s_vs_slots(runs: Sequence[Results], path: Path) -> None:
    """Decode speed against the share of experts that have slots: medians, and ranges over the repeats as bars; bounds as lines.

    Runs that all have the same slots are drawn arm by arm instead.
    """
    look_of = looks(runs)
    fractions = sorted({run.slots_fraction for run in runs})
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.8), layout="constrained")
        axes = figure.subplots()
        if len(fractions) == 1:
            _speed_by_arm(axes, runs, look_of)
        else:
            for name, look in look_of.items():
                _draw_speed(axes, [(100 * run.slots_fraction, run) for run in runs], name, look)
            axes.set_xticks([100 * fraction for fraction in fractions])
            axes.set_xlabel("experts that have a slot (% of all)")
        simulated = all(run.simulated for run in runs)  # each repeat would be the same
        axes.set_ylabel("decoded tokens per second" + ("" if simulated else "\n(median; bars: lowest to highest repeat)"))
        axes.set_ylim(bottom=0)
        axes.set_title(f"Decode speed{_conditions(runs)}", loc="left")
        _legend(figure, look_of)
        _save(figure, path)


def recall_per_layer(results: Results, path: Path) -> None:
    """Recall@k of each predictor at each MoE layer of the decode phase, beside its recall over experts not resident."""
    predicted = {name: arm.quality for name, arm in results.ordered() if arm.quality is not None}
    with rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.4), layout="constrained")
        recall, cold = figure.subplots(1, 2, sharey=True)
        look_of = {name: look for name, look in looks([results]).items() if name in predicted}
        for name, look in look_of.items():
            layers = predicted[name].decode_per_layer()
            for axes, metric in ((recall, "recall"), (cold, "cold_recall")):
                if len(layers):
                    style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "ls": look.line}
                    axes.plot(layers["layer"], 100 * layers[metric], lw=1.8, ms=5, **style)
        recall.set_ylabel("true experts among the k best guesses (%)")
        recall.set_title("Recall@k, decode", loc="left")
        cold.set_title("Cold recall@k: over experts not resident", loc="left")
        for axes in (recall, cold):
            axes.set_xlabel("MoE layer (no point: nothing was predicted)")
            axes.set_ylim(-2, 104)
            axes.set_xlim(-0.4, _n_layers(results) - 0.6)
            axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, look_of)
        _save(figure, path)


def time_breakdown(results: Results, path: Path) -> None:
    """Where the time of a decoded token goes, one stacked bar per arm, in milliseconds; whiskers: range of the totals.

    A bar is the mean over a run of what each sequence waits for its token, and of that the median over repeats. Arms whose
    parts were not measured have a hatched bar.
    """
    arms = [(name, arm) for name, arm in results.ordered() if spread(arm.values("tpot_mean_s")).n]
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 1.6 + 0.45 * len(arms)), layout="constrained")
        axes = figure.subplots()
        for y, (_, arm) in enumerate(arms):
            total = spread([1e3 * seconds for seconds in arm.values("tpot_mean_s")])
            _stacked_bar(axes, y, total.median, {part: spread(arm.values(f"{part}_share")).median for part in PART_COLOURS})
            reach = [[total.median - total.low], [total.high - total.median]]
            axes.errorbar(total.median, y, xerr=reach, color=BLACK, capsize=3, lw=1.2)
            axes.annotate(f"{total.median:.1f} ms", (total.high, y), xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(arms)), [f"{name} (bound)" if arm.role == BOUND else name for name, arm in arms])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("time per decoded token (ms)")
        axes.set_title(f"Where a token's time goes{_conditions([results])}", loc="left")
        handles = [Line2D([], [], color=colour, lw=7, label=PART_LABELS[part]) for part, colour in PART_COLOURS.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.0, columnspacing=1.4)
        _save(figure, path)


def _n_layers(results: Results) -> int:
    rows = [row for arm in results.arms.values() if arm.quality for row in arm.quality.per_layer]
    return 1 + max((int(row["layer"]) for row in rows), default=0)


def _stacked_bar(axes: Axes, y: int, total: float, share_of: dict[str, float]) -> None:
    """Each part's share of `total`; the medians of shares are scaled to fill it."""
    if any(math.isnan(share) for share in share_of.values()):
        axes.barh(y, total, color="white", edgecolor=BOUND_COLOUR, hatch="//", height=0.62)
        return
    left, whole = 0.0, sum(share_of.values())
    for part, share in share_of.items():
        width = total * share / whole
        axes.barh(y, width, left=left, color=PART_COLOURS[part], height=0.62)
        left += width


def _speed_by_arm(axes: Axes, runs: Sequence[Results], look_of: dict[str, Look]) -> None:
    """One place on the x axis per arm that is no bound; bounds are lines across all of them."""
    names = [name for name, look in look_of.items() if look.marker]
    for name, look in look_of.items():
        x = names.index(name) if look.marker else 0
        _draw_speed(axes, [(x, run) for run in runs], name, look)
    axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 4 else 0)
    axes.set_xlim(-0.5, max(len(names), 1) - 0.5)
    axes.grid(axis="x", visible=False)


def _draw_speed(axes: Axes, places: list[tuple[float, Results]], name: str, look: Look) -> None:
    """Medians with bars, or for a bound a line with a band. A bound at one place only is a line across."""
    found = [(x, spread(run.arms[name].values("tokens_per_s"))) for x, run in places if name in run.arms]
    found = sorted(((x, speed) for x, speed in found if speed.n), key=lambda point: point[0])
    if not found:
        return
    x, speeds = np.array([x for x, _ in found]), [speed for _, speed in found]
    median, low, high = (np.array([getattr(speed, part) for speed in speeds]) for part in ("median", "low", "high"))
    if look.marker:
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "ls": look.line}
        axes.errorbar(x, median, yerr=[median - low, high - median], lw=1.8, capsize=3, **style)
    elif len(set(x.tolist())) == 1:
        for middle, bottom, top in zip(median, low, high, strict=True):
            axes.axhline(middle, color=look.colour, ls=look.line, lw=1.6)
            axes.axhspan(bottom, top, color=look.colour, alpha=0.12, lw=0)
    else:
        axes.plot(x, median, color=look.colour, ls=look.line, lw=1.6)
        axes.fill_between(x, low, high, color=look.colour, alpha=0.12, lw=0)


def _legend(figure: Figure, look_of: dict[str, Look]) -> None:
    handles = [
        Line2D([], [], lw=1.8, color=look.colour, marker=look.marker, ls=look.line, label=name + " (bound)" * (not look.marker))
        for name, look in look_of.items()
    ]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", handlelength=2.8)


def _conditions(runs: Sequence[Results]) -> str:
    fractions = {run.slots_fraction for run in runs}
    slots = f", {100 * fractions.pop():.0f} % slots" if len(fractions) == 1 else ""
    formats = sorted(run.quantised for run in runs if run.quantised)
    slots += f", experts in {' or '.join(dict.fromkeys(formats))}" if formats else ""
    slots += ", emulated link" if any(run.emulated for run in runs) else ""
    return slots + (", simulated" if any(run.simulated for run in runs) else "")


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as aside:
        figure.savefig(aside, format="png")
