"""The GPU check's JSON as Markdown, in docs/kernels.md: `python -m scripts.gpu_tables`.

Reads every file of docs/results/gpu/; where there is none, or a section was skipped, the tables say "not measured".
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.atomic import write_text
from prefetch.errors import GatecastError
from scripts.gpu.findings import Found, read
from scripts.gpu.tables import NOT_MEASURED, device_tables, unmeasured_targets
from scripts.gpu_check import RESULTS
from scripts.results_page import filled

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"


def main() -> int:
    try:
        write_text(PAGE, filled(PAGE, {"gpu": markdown(read_all(RESULTS))}))
    except GatecastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(PAGE)
    return 0


def read_all(folder: Path) -> list[Found]:
    """The checks of all devices, by file name.

    Raises:
        ResultsError: a file is damaged.
    """
    return [read(path) for path in sorted(folder.glob("*.json"))]


def markdown(devices: list[Found]) -> str:
    """All tables of all devices; with no device, the targets alone."""
    if not devices:
        return "\n\n".join([f"No GPU has been at hand: {NOT_MEASURED}.", unmeasured_targets()])
    return "\n\n".join(part for found in devices for part in device_tables(found))


if __name__ == "__main__":
    sys.exit(main())
