"""Put what `make results` measured into docs/results and between the markers of docs/results.md and README.md.

    python -m scripts.results_page outputs/results

Figures are copied by this program alone, so that no page shows a number that no run wrote. What they mean is written by hand,
outside the markers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from experiments.atomic import write_text
from experiments.bench_tables import markdown_bench
from experiments.results import Results
from experiments.tables import markdown_comparison
from prefetch.errors import GatecastError, ResultsError

REPOSITORY = Path(__file__).resolve().parents[1]
COMPARISONS = ("slots_25", "slots_45")
KEPT = [
    *(f"{name}/{file}" for name in COMPARISONS for file in ("results.json", "time_breakdown.png", "recall_per_layer.png")),
    "bench/bench.json",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where make results left slots_25, slots_45 and bench")
    measured = parser.parse_args().folder
    try:
        publish(measured, REPOSITORY)
    except GatecastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def publish(measured: Path, repository: Path) -> None:
    """Copy the records and pictures of `measured` into the repository, then fill in its pages.

    Raises:
        ResultsError: a result is missing or damaged, or a page lacks a marker.
    """
    pages(measured, repository)  # before anything is replaced
    for kept in KEPT:
        target = repository / "docs" / "results" / kept
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(measured / kept, target)
    for page, text in pages(repository / "docs" / "results", repository).items():
        write_text(page, text)


def pages(records: Path, repository: Path) -> dict[Path, str]:
    """The pages of `repository` with the figures of `records` between their markers."""
    blocks = {name: markdown_comparison(Results.load(records / name)) for name in COMPARISONS}
    bench = _read_bench(records / "bench" / "bench.json")
    blocks |= {"conditions": conditions(bench["provenance"]), "bench": markdown_bench(bench)}
    speed = {"slots_25": blocks["slots_25"].split("\n\n**Guesses")[0]}
    results, readme = repository / "docs" / "results.md", repository / "README.md"
    return {results: filled(results, blocks), readme: filled(readme, speed)}


def filled(page: Path, blocks: dict[str, str]) -> str:
    """The text of `page` with each block between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ResultsError(f"{page}: the markers {begin.strip()} and {end} are missing")
        text = before + begin + block.strip() + "\n" + end + after
    return text


def conditions(provenance: dict[str, Any]) -> str:
    """One line on machine and versions."""
    hardware, versions = provenance["hardware"], provenance["versions"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    packages = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers"))
    return (
        f"{hardware['cores']} cores of {hardware['cpu']}, {hardware['ram_bytes'] / 1e9:.0f} GB of memory, {gpus}, "
        f"{hardware['system']}, experts on {provenance['storage']['file_system']}; {packages}; "
        f"commit {str(provenance['git']['commit'])[:12]}{' with changes' if provenance['git']['dirty'] else ''}, {provenance['time'][:10]}."
    )


def _read_bench(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read ({error}); make results writes it") from error
    return found


if __name__ == "__main__":
    sys.exit(main())
