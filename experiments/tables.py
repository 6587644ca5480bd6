"""The comparison of a run's arms: one wide table of numbers for machines, two narrow ones for people.

Bounds stand apart and are called bounds. What no clock measured is called simulated, what an emulated link paced is called
emulated, and a dash is what was not measured.
"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from experiments.atomic import write_text
from experiments.results import BELADY, BELADY_OVERLAP, BOUND, OVERLAP, PREDICTOR, ArmResult, Results
from experiments.statistics import Spread, is_difference, paired_ratio, share_of_gain, spread

NOT_MEASURED = "–"
BYTES_PER_MB = 1e6
WIDE = 110  # columns that the tables need
BELADY_ROW = "belady"
OVERLAP_ROWS = {OVERLAP: "overlap", BELADY_OVERLAP: "belady_overlap"}
SPEED = "Speed"
TRAFFIC = "Guesses, hits and traffic of decoding"
FOOTNOTE = (
    f"median [lowest, highest] of the repeats; {NOT_MEASURED} = not measured; ≈ = no difference from the baseline beyond the "
    "repeats' spread; lossless ✓ = the tokens of the unmodified model"
)
FOOTNOTE_SIMULATED = (
    f"simulated: the same each time, so without spread; {NOT_MEASURED} = not known; overlap = what computing takes, or moving what the "
    "baseline misses, whichever is longer: what perfect guesses can reach with that cache; belady_overlap = likewise with any cache of those "
    "slots; neither holds where experts are computed in place, or all fit"
)
METRICS = (
    "tokens_per_s", "tpot_mean_s", "tpot_median_s", "tpot_p95_s", "ttft_s",
    "stall_share", "expert_share", "predictor_share", "overhead_share", "dense_share",
    "hit_rate", "prefetch_hit_rate", "late_rate", "miss_rate", "in_place_rate",
    "demand_bytes_per_token", "useful_bytes_per_token", "wasted_bytes_per_token", "cancelled_bytes_per_token",
    "preload_bytes", "link_utilisation",
)  # fmt: skip
QUALITIES = ("coverage", "recall", "recall_all", "weight_mass", "exact_set", "cold_recall", "cold_precision")

Cells = dict[str, str]  # of one row: column, whose name may have a line break, -> text


def comparison(results: Results) -> pd.DataFrame:
    """One row per arm, and one for each bound that no arm is; numbers only, for CSV and wandb.

    Columns: run, slots, slots_fraction, arm, role, conditions ("measured" | "emulated" | "simulated"), lossless, n_repeats;
    each of METRICS as median over the repeats; tokens_per_s, ratio and share_of_gain also with `_low` and `_high`;
    differs (from the baseline beyond the spread); QUALITIES of the decode phase at the nearest lookahead.
    """
    rows = [_numbers(results, name, arm) for name, arm in results.ordered()]
    where = {"run": results.name, "slots": results.slots, "slots_fraction": results.slots_fraction}
    for bound, arm in ({BELADY: BELADY_ROW} | OVERLAP_ROWS).items():
        if bound in results.bounds:
            metric = "hit_rate" if bound == BELADY else "tokens_per_s"
            rows.append(where | {"arm": arm, "role": BOUND, "conditions": "simulated", metric: results.bounds[bound]})
    return pd.DataFrame(rows)


def rich_comparison(results: Results, width: int) -> Group:
    """The two tables for a terminal of `width` columns; in one narrower than `WIDE` cells wrap."""
    return Group(
        _rich(f"{SPEED}, {_conditions(results)}", _speed_rows(results), width),
        _rich(TRAFFIC, _traffic_rows(results), width),
        Text(_footnote(results), style="dim"),
    )


def markdown_comparison(results: Results) -> str:
    """The two tables as Markdown."""
    parts = [
        f"**{SPEED}**, {_conditions(results)}",
        _markdown(_speed_rows(results)),
        f"**{TRAFFIC}**",
        _markdown(_traffic_rows(results)),
        _footnote(results),
    ]
    return "\n\n".join(parts) + "\n"


def write_comparison(results: Results, folder: Path) -> list[Path]:
    """Write `comparison.csv` and `comparison.md` into `folder`, atomically; returns their paths."""
    csv, markdown = folder / "comparison.csv", folder / "comparison.md"
    write_text(csv, comparison(results).to_csv(index=False, float_format="%.6g"))
    write_text(markdown, markdown_comparison(results))
    return [csv, markdown]


def _numbers(results: Results, name: str, arm: ArmResult) -> dict[str, object]:
    speed, ratio, share = spread(arm.values("tokens_per_s")), _ratio(results, arm), _share(results, arm)
    numbers: dict[str, object] = {
        "run": results.name,
        "slots": results.slots,
        "slots_fraction": results.slots_fraction,
        "arm": name,
        "role": arm.role,
        "conditions": "simulated" if results.simulated else "emulated" if arm.emulated else "measured",
        "lossless": arm.lossless,
        "n_repeats": len(arm.repeats),
    }
    numbers |= {metric: spread(arm.values(metric)).median for metric in METRICS}
    numbers |= {"tokens_per_s_low": speed.low, "tokens_per_s_high": speed.high}
    for label, found in (("ratio", ratio), ("share_of_gain", share)):
        numbers |= {label: found.median, f"{label}_low": found.low, f"{label}_high": found.high}
    numbers["differs"] = _differs(results, arm)
    row = arm.quality.decode() if arm.quality else {}
    return numbers | {figure: row.get(figure, math.nan) for figure in QUALITIES}


def _speed_rows(results: Results) -> list[Cells]:
    rows = [_speed(results, name, arm) for name, arm in results.ordered()]
    if BELADY in results.bounds:
        rows.append({"arm": f"{BELADY_ROW} ({BOUND}, simulated)"})
    return rows + [_overlap(results, bound) for bound in OVERLAP_ROWS if bound in results.bounds]


def _overlap(results: Results, bound: str) -> Cells:
    """What perfect guesses can reach over this link: with the baseline's cache, or with any of its size."""
    speed, base = results.bounds[bound], results.baseline()
    ratio = speed / spread(base.values("tokens_per_s")).median if base else math.nan
    return {
        "arm": f"{OVERLAP_ROWS[bound]} ({BOUND}, simulated)",
        "tokens/s": _cell(speed, "{:.1f}"),
        f"× {_baseline_name(results)}": _cell(ratio, "{:.2f}"),
    }


def _speed(results: Results, name: str, arm: ArmResult) -> Cells:
    ratio = _range(_ratio(results, arm), "{:.2f}")
    same = arm is not results.baseline() and ratio != NOT_MEASURED and not _differs(results, arm)
    cells = {
        "arm": _label(results, name, arm),
        "tokens/s": _range(spread(arm.values("tokens_per_s")), "{:.1f}"),
        f"× {_baseline_name(results)}": ratio + (" ≈" if same else ""),
        "oracle's\ngain %": _range(_share(results, arm), "{:.0f}", 100),
        "TPOT ms\np50 / p95": _medians(arm, ("tpot_median_s", "tpot_p95_s"), "{:.1f}", 1e3),
    }
    if results.simulated:
        return cells
    return cells | {"TTFT\ns": _medians(arm, ("ttft_s",), "{:.2f}"), "lossless": "✓" if arm.lossless else "✗"}


def _traffic_rows(results: Results) -> list[Cells]:
    rows = [_traffic(results, name, arm) for name, arm in results.ordered()]
    if BELADY in results.bounds:
        hit_rate = f"{100 * results.bounds[BELADY]:.0f} / {NOT_MEASURED} / {100 * (1 - results.bounds[BELADY]):.0f}"
        rows.append({"arm": f"{BELADY_ROW} ({BOUND}, simulated)", "%\nhit / late / miss": hit_rate})
    return rows


def _traffic(results: Results, name: str, arm: ArmResult) -> Cells:
    n_bytes = tuple(f"{outcome}_bytes_per_token" for outcome in ("demand", "useful", "wasted"))
    row = arm.quality.decode() if arm.quality else {}
    return {
        "arm": _label(results, name, arm),
        "recall\n@k %": _cell(row.get("recall", math.nan), "{:.0f}", 100),
        "cold\nrecall %": _cell(row.get("cold_recall", math.nan), "{:.0f}", 100),
        "stall\n%": _medians(arm, ("stall_share",), "{:.0f}", 100),
        "%\nhit / late / miss": _medians(arm, ("hit_rate", "late_rate", "miss_rate"), "{:.0f}", 100),
        "hits by\nprefetch %": _cell(_prefetched_share_of_hits(arm), "{:.0f}", 100),
        "MB/token\ndemand / useful / wasted": _medians(arm, n_bytes, "{:.2f}", 1 / BYTES_PER_MB),
        "link\nuse %": _medians(arm, ("link_utilisation",), "{:.0f}", 100),
    }


def _prefetched_share_of_hits(arm: ArmResult) -> float:
    hits = spread(arm.values("hit_rate")).median
    return spread(arm.values("prefetch_hit_rate")).median / hits if hits else math.nan


def _ratio(results: Results, arm: ArmResult) -> Spread:
    base = results.baseline()
    return paired_ratio(arm.values("tokens_per_s"), base.values("tokens_per_s")) if base and _paired(arm, base) else spread([])


def _share(results: Results, arm: ArmResult) -> Spread:
    base, oracle = results.baseline(), results.oracle()
    if not (arm.role == PREDICTOR or arm is oracle) or not (base and oracle and _paired(arm, base) and _paired(oracle, base)):
        return spread([])
    return share_of_gain(*(a.values("tokens_per_s") for a in (arm, base, oracle)), exact=results.simulated)


def _differs(results: Results, arm: ArmResult) -> bool:
    base = results.baseline()
    if base is None or not _paired(arm, base):
        return False
    return is_difference(arm.values("tokens_per_s"), base.values("tokens_per_s"), exact=results.simulated)


def _paired(arm: ArmResult, other: ArmResult) -> bool:
    """A bound may have been run less often than the other arms; then it has no pairs."""
    return len(arm.repeats) == len(other.repeats)


def _baseline_name(results: Results) -> str:
    return next((name for name, arm in results.arms.items() if arm is results.baseline()), "baseline")


def _conditions(results: Results) -> str:
    experts = f", {results.quantised}" if results.quantised else ""
    slots = f"{results.slots} slots = {results.slots_fraction:.0%} of all experts{experts}"
    if results.simulated:
        return f"{slots}, simulated: recorded routing replayed"
    n = _n_repeats(results)
    repeats = f"{n} repeat{'' if n == '1' else 's'}"
    return f"{slots}, {'emulated link' if results.emulated else 'measured'}, {repeats}"


def _footnote(results: Results) -> str:
    if results.simulated:
        return FOOTNOTE_SIMULATED
    if results.quantised is None:
        return FOOTNOTE
    return f"{FOOTNOTE} with its experts quantised in the same way ({results.quantised}), lossy against the original"


def _n_repeats(results: Results) -> str:
    counts = sorted({len(arm.repeats) for arm in results.arms.values()})
    return "–".join(map(str, counts[:1] + counts[-1:])) if len(counts) > 1 else str(counts[0] if counts else 0)


def _label(results: Results, name: str, arm: ArmResult) -> str:
    """The arm's name, with what a reader must know of it beyond the table's title."""
    mixed = len({other.emulated for other in results.arms.values()}) > 1
    remarks = [BOUND] * (arm.role == BOUND) + ["emulated" if arm.emulated else "measured"] * mixed
    return f"{name} ({', '.join(remarks)})" if remarks else name


def _range(found: Spread, form: str, scale: float = 1.0) -> str:
    median, low, high = (_cell(value, form, scale) for value in (found.median, found.low, found.high))
    return f"{median} [{low}, {high}]" if found.n > 1 else median


def _medians(arm: ArmResult, metrics: tuple[str, ...], form: str, scale: float = 1.0) -> str:
    return " / ".join(_cell(spread(arm.values(metric)).median, form, scale) for metric in metrics)


def _cell(value: float, form: str, scale: float = 1.0) -> str:
    return NOT_MEASURED if math.isnan(value) else form.format(value * scale)


def _columns(rows: list[Cells]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _rich(title: str, rows: list[Cells], width: int) -> Table:
    """Names are never cut: where `width` columns are too few, remarks on them go to lines of their own, and figures wrap."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=width < WIDE)
    columns = _columns(rows)
    for column in columns:
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column == "arm")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        at_boundary = following is not None and (BOUND in following["arm"]) != (BOUND in row["arm"])
        cells = row if width >= WIDE else row | {"arm": row["arm"].replace(" ", "\n")}
        table.add_row(*(Text(cells.get(column, NOT_MEASURED)) for column in columns), end_section=at_boundary)
    return table


def _markdown(rows: list[Cells]) -> str:
    columns = _columns(rows)
    lines = [[column.replace("\n", " ") for column in columns], ["---" if column == "arm" else "---:" for column in columns]]
    lines += [[row.get(column, NOT_MEASURED) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
