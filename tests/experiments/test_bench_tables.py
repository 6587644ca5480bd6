"""What the bench prints: every figure of its record, in a terminal of 80 columns."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from experiments.bench_tables import figure_rows, profile_rows, rich_bench

RECORD = Path(__file__).parents[2] / "docs" / "results" / "bench" / "bench.json"


def test_every_figure_is_printed_in_80_columns() -> None:
    bench = json.loads(RECORD.read_text())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(rich_bench(bench))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    printed = {word for line in lines for word in line.split()}
    rows = figure_rows(bench) + profile_rows(bench)
    assert printed >= {word for row in rows for cell in row for word in cell.split()}, "a word was cut"
