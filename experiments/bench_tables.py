"""What `experiments.bench` measured, beside its targets, and where the runtime's own time goes: for a terminal and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

FIGURES = ("what", "measured", "target")
PROFILE = ("function", "us per call", "calls")
PROFILE_CAPTION = "The runtime's own functions that take most of a profiled decode (self time; profiling inflates it):"
N_PROFILED = 6  # functions that are shown
ACCELERATE = {"page_cache": "its files in the page cache", "from_disk": "its files read from the disk"}

Rows = list[tuple[str, str, str]]


def rich_bench(bench: dict[str, Any]) -> Group:
    """Both tables for a terminal, where cells wrap."""
    profile = _rich(PROFILE, profile_rows(bench))
    return Group(_rich(FIGURES, figure_rows(bench), show_lines=True), Text(PROFILE_CAPTION), profile)


def markdown_bench(bench: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    profile = [(f"`{function}`", *figures) for function, *figures in profile_rows(bench)]
    return "\n".join([*_markdown(FIGURES, figure_rows(bench)), "", PROFILE_CAPTION, "", *_markdown(PROFILE, profile)])


def figure_rows(bench: dict[str, Any]) -> Rows:
    """What was measured, the figure and its target; `bench` is what bench.json holds."""
    exact, rounded, resident = bench["exactness_float32"], bench["exactness_bfloat16"], bench["resident_speed"]
    tpot_s, fastest = resident["tpot_s"], resident["fastest_of_transformers"]
    transfers, overlap, overhead = bench["transfers"], bench["overlap"], bench["overhead"]
    return [
        ("tokens equal to unmodified transformers, fp32, greedy", _equal(exact), "all"),
        (
            "the same in bf16",
            f"{rounded['sequences_that_diverge']} of {rounded['sequences']} sequences part at some step, "
            f"{rounded['divergences_beyond_rounding']} beyond rounding (largest margin {rounded['largest_margin_at_a_divergence']:.3g})",
            "only within rounding",
        ),
        (
            "all resident: time per token",
            f"{_ms(tpot_s['gatecast'])}; transformers' fastest ({fastest}) {_ms(tpot_s[fastest])}: ratio {resident['ratio_median']:.2f}",
            "<= 1.05",
        ),
        *(_against_accelerate(bench["accelerate_disk_offload"][how], label) for how, label in ACCELERATE.items()),
        (
            "queued transfers against bare reads by as many threads",
            f"{_gb(transfers['transfers_bytes_per_s'])} against {_gb(transfers['bare_bytes_per_s'])} GB/s: {transfers['share_median']:.0%}",
            ">= 85 %",
        ),
        (
            "oracle's time per token, against the longer of moving and computing",
            f"{overlap['to_own_median']:.2f} x with computing as in the same run, {overlap['to_resident_median']:.2f} x with "
            "computing as with everything resident",
            "<= 1.15",
        ),
        (
            "runtime overhead per layer call, no miss, no predictor",
            f"{overhead['overhead_us_median']:.0f} us beside {overhead['expert_us_median']:.0f} us of expert arithmetic",
            "shown",
        ),
    ]


def profile_rows(bench: dict[str, Any]) -> Rows:
    """The functions that take most: name, microseconds of a call, calls."""
    slowest = bench["overhead"]["profile_self_time"][:N_PROFILED]
    return [(row["function"], f"{row['self_us_per_call']:.1f}", str(row["calls"])) for row in slowest]


def _against_accelerate(found: dict[str, Any], label: str) -> tuple[str, str, str]:
    tpot_s = found["tpot_s"]
    return (
        f"gate reuse at 25 % slots against accelerate's disk offload of the experts, {label}",
        f"{_ms(tpot_s['gatecast'])} against {_ms(tpot_s['accelerate'])}: {found['speed_up_median']:.1f} x",
        ">= 5 x",
    )


def _equal(exact: dict[str, Any]) -> str:
    total = exact["tokens_compared"]
    return f"{total} of {total}" if not exact["sequences_that_diverge"] else f"{exact['sequences_that_diverge']} sequences part"


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.2f} [{min(seconds) * 1e3:.2f}, {max(seconds) * 1e3:.2f}] ms"


def _gb(bytes_per_s: list[float]) -> str:
    return f"{statistics.median(bytes_per_s) / 1e9:.2f}"


def _rich(columns: Sequence[str], rows: Rows, show_lines: bool = False) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_lines=show_lines)
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: rich takes [1.2, 3.4] for markup
    return table


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
