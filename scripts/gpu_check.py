"""Check the kernels on a GPU, then time them: correctness first, every peer beside ours, the roof beside all.

    python -m scripts.gpu_check                              # everything, what matters most first, until the minutes are over
    python -m scripts.gpu_check --only correctness decode    # sections whose names begin so
    python -m scripts.gpu_check --list                       # their names

Each section runs in a process of its own, with a time limit. Writes docs/results/gpu/<device>.json anew with every result: a stop, a
crash or a hang loses nothing, and the same command goes on where the last one ended. `python -m scripts.gpu_tables` makes
Markdown of the JSON.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from prefetch.errors import ResultsError
from scripts.gpu.compile_ahead import settle_names
from scripts.gpu.device_facts import device_facts
from scripts.gpu.findings import Findings
from scripts.gpu.forked import Row, run_forked
from scripts.gpu.sections import Section, compiling, sections
from scripts.gpu.tables import device_tables, section_table
from scripts.gpu.verdicts import wrong

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "gpu"
FACTS_S = 60.0
SHORTEST_S = 5.0  # with less, no section is begun

console = Console(stderr=True)


def main() -> None:
    options = _options()
    if options.list:
        print("\n".join(section.name for section in sections()))
        return
    chosen = [s for s in sections() if options.only is None or s.name.startswith(tuple(options.only))]
    if not chosen:
        sys.exit(f"error: no section's name begins with {' or '.join(options.only)}; --list shows them")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))  # so that no section outlives the check
    end_s = time.monotonic() + 60 * options.minutes
    settle_names()
    device = _device()
    path = options.out or RESULTS / f"{re.sub(r'[^A-Za-z0-9]+', '-', device['name'])}.json"
    try:
        findings = Findings(path, device)
    except ResultsError as error:
        sys.exit(f"error: {error}")
    commit = options.commit or (device["provenance"]["git"] or {}).get("commit")
    to_do = [section for section in chosen if not findings.holds(section.name)]
    run_sections([compiling(to_do, device["capability"]), *to_do] if to_do else [], findings, commit, end_s)
    _conclude(findings)


def run_sections(
    to_do: list[Section], findings: Findings, commit: str | None, end_s: float, clock: Callable[[], float] = time.monotonic
) -> None:
    """Run all that time allows, each in a process of its own, and keep every row as it comes."""
    for section in to_do:
        left_s = end_s - clock()
        if left_s < SHORTEST_S:
            findings.skip(section.name, "out of time")
            continue
        console.print(f"{section.name} ...", markup=False)
        findings.begin(section.name, commit)
        rows: list[Row] = []

        def keep(row: Row, name: str = section.name, rows: list[Row] = rows) -> None:
            rows.append(row)
            findings.add(name, row)

        began_s = clock()
        stopped = run_forked(section.run, min(section.limit_s, left_s), keep)
        findings.end(section.name, clock() - began_s, stopped)
        if rows:
            print(section_table(section.name, rows), flush=True)
        console.print(f"  {clock() - began_s:.1f} s{f', stopped: {stopped}' if stopped else ''}", markup=False)


def _device() -> Row:
    """Asked by a process of its own: this one must never initialise CUDA, or its children could not."""
    facts: list[Row] = []
    problem = run_forked(device_facts, FACTS_S, facts.append)
    if not facts:
        sys.exit(
            f"error: no CUDA device ({problem}): this script measures GPU kernels; without one, make test checks them in the interpreter"
        )
    return facts[0]


def _conclude(findings: Findings) -> None:
    found = findings.judged()
    print("\n\n".join(device_tables(found)), flush=True)
    console.print(f"results: {findings.path}", markup=False)
    faults = wrong(found)
    for fault in faults:
        console.print(f"wrong: {fault}", markup=False)
    if faults:
        sys.exit("error: a kernel of this project is wrong on this GPU; see correctness in the results")
    unchecked = [s.name for s in sections() if s.name.startswith("correctness ") and not findings.holds(s.name)]
    if unchecked:
        sys.exit(f"error: not checked to its end: {', '.join(unchecked)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="beginnings of the names of what to run; all by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="after so long everything ends")
    parser.add_argument("--out", type=Path, help="where the JSON goes; what it holds already is not run again")
    parser.add_argument("--commit", help="of the code, where there is no repository to ask")
    parser.add_argument("--list", action="store_true", help="print the sections' names and end")
    return parser.parse_args()


if __name__ == "__main__":
    main()
