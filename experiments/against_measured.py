"""How near a replay comes to the run whose machine it stands in for: simulated figures beside measured ones."""

from __future__ import annotations

import math

import pandas as pd
from rich import box
from rich.table import Table

from experiments.results import Results
from experiments.statistics import spread

TITLE = "Simulated against measured, decoding; shares: measured / simulated"
FIGURES = ("hit_rate", "late_rate", "miss_rate", "stall_share")
ALIKE = ("staging", "transient", "scope", "preload", "prefetch_admission")  # knobs of `cache`


def unlike(simulated: Results, measured: Results) -> list[str]:
    """Where the two differ in what all their arms share, so that arms of one name are not the same arm."""
    here, there = simulated.config, measured.config
    pairs = {f"cache.{knob}": (here["cache"][knob], there["cache"].get(knob)) for knob in ALIKE}
    pairs["cache.slots"] = simulated.slots, measured.slots
    pairs["planner"] = here["planner"], there["planner"]
    pairs["warmup_sequences"] = here["warmup_sequences"], there["workload"]["warmup_batches"]
    pairs["max_sequences"] = here["max_sequences"], None
    return [f"{option} ({ours}, measured with {theirs})" for option, (ours, theirs) in pairs.items() if ours != theirs]


def against_measured(simulated: Results, measured: Results) -> pd.DataFrame:
    """One row per arm that both have, in the order of every table.

    Columns: arm; measured, low, high (tokens/s, median and range over the repeats); simulated (tokens/s); difference (of simulated from the
    measured median, as a fraction of it); each of FIGURES as `measured_...` and `simulated_...`.
    """
    rows = []
    for name, arm in simulated.ordered():
        if name not in measured.arms:
            continue
        there, here = spread(measured.arms[name].values("tokens_per_s")), spread(arm.values("tokens_per_s")).median
        row: dict[str, object] = {"arm": name, "measured": there.median, "low": there.low, "high": there.high}
        row |= {"simulated": here, "difference": here / there.median - 1}
        for figure in FIGURES:
            row |= {f"measured_{figure}": spread(measured.arms[name].values(figure)).median}
            row |= {f"simulated_{figure}": spread(arm.values(figure)).median}
        rows.append(row)
    return pd.DataFrame(rows)


def rich_against_measured(table: pd.DataFrame) -> Table:
    """The comparison for a terminal."""
    found = Table(title=TITLE, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    columns = (
        "arm",
        "tokens/s\nmeasured",
        "tokens/s\nsimulated",
        "differs\nby %",
        "stall\n%",
        "hits\n%",
    )
    for column in columns:
        found.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for row in table.to_dict("records"):
        found.add_row(
            row["arm"],
            f"{row['measured']:.1f} [{row['low']:.1f}, {row['high']:.1f}]",
            f"{row['simulated']:.1f}",
            f"{100 * row['difference']:+.0f}",
            *(_pair(row[f"measured_{figure}"], row[f"simulated_{figure}"]) for figure in ("stall_share", "hit_rate")),
        )
    return found


def _pair(*shares: float) -> str:
    return " / ".join("–" if math.isnan(share) else f"{100 * share:.0f}" for share in shares)
