"""The GPU check's JSON as Markdown, in docs/kernels.md: `python -m scripts.gpu_tables`.

Reads every file of docs/results/gpu/; where there is none, or a section was skipped, the tables say "not measured".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from experiments.atomic import write_text
from prefetch.errors import GatecastError, ResultsError
from scripts.gpu_check import COPY_TARGET, RESULTS, TARGETS
from scripts.results_page import filled

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
NOT_MEASURED = "not measured"
Found = dict[str, Any]  # one device's JSON


def main() -> int:
    try:
        write_text(PAGE, filled(PAGE, {"gpu": markdown(read(RESULTS))}))
    except GatecastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(PAGE)
    return 0


def read(folder: Path) -> list[Found]:
    """The checks of all devices, by file name.

    Raises:
        ResultsError: a file is damaged.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise ResultsError(f"{path}: not a GPU check's result ({error}); remove it or run the check again") from error
    return found


def markdown(devices: list[Found]) -> str:
    """All tables of all devices; with no device, the targets alone."""
    if not devices:
        return "\n\n".join([f"No GPU has been at hand: {NOT_MEASURED}.", targets_table({})])
    return "\n\n".join(part for found in devices for part in _device(found))


def _device(found: Found) -> list[str]:
    parts = [f"**{found['device']}**, {found['memory_bytes'] / 1e9:.0f} GB, {_versions(found)}", targets_table(found)]
    if "correctness" in found:
        right = sum(verdict["passed"] for verdict in found["correctness"])
        parts.append(f"Correct against float64: {right} of {len(found['correctness'])} checks.")
    parts += [decode_table(section) for name, section in found.items() if name.startswith("decode ")]
    if "transfers" in found:
        parts.append(transfers_table(found["transfers"]))
    if found["skipped"]:
        parts.append("Skipped: " + "; ".join(f"{name} ({reason})" for name, reason in found["skipped"].items()) + ".")
    return parts


def targets_table(found: Found) -> str:
    """Every target, what was measured of it, and the roof there."""
    rows = [["operation", "model", "tokens", "target us", "measured us", "of the roof"]]
    times = [time for name, section in found.items() if name.startswith("kernels ") for time in section["times"]]
    ours = {(t["operation"], t["shape"], t["n_tokens"]): t for t in times if t["provider"] == "ours" and t["timing"]}
    for (operation, shape, n_tokens), target_us in TARGETS.items():
        time = ours.get((operation, shape, n_tokens))
        measured, share = NOT_MEASURED, ""
        if time is not None:
            us = min(time["timing"]["first_us"], time["timing"]["second_us"])
            measured = f"{us:.1f} ({'met' if us <= target_us else 'missed'})"
            share = f"{time['share_of_roof']:.0%}" if time["share_of_roof"] is not None else ""
        rows.append([operation, shape, str(n_tokens), f"{target_us:g}", measured, share])
    return _table(rows)


def decode_table(section: Found) -> str:
    """Offloaded decoding of one model and format."""
    arms = section["arms"]
    title = f"Offloaded decoding, {arms[0]['model']}, experts in {arms[0]['experts']}, generated weights and routing:"
    rows = [["arm", "driven by", "slots", "tokens/s [lowest, highest]", "hits", "MB/token", "stall ms/token"]]
    for arm in arms:
        if arm["tokens_per_s"] is None:
            rows.append([arm["arm"], arm["driven_by"], str(arm["n_slots"]), f"{NOT_MEASURED}: {arm['skipped']}", "", "", ""])
            continue
        rate = f"{arm['tokens_per_s']:.1f} [{arm['lowest']:.1f}, {arm['highest']:.1f}]"
        stall = NOT_MEASURED if arm["stall_s_per_token"] is None else f"{1e3 * arm['stall_s_per_token']:.2f}"
        moved = f"{arm['moved_bytes_per_token'] / 1e6:.0f}"
        rows.append([arm["arm"], arm["driven_by"], str(arm["n_slots"]), rate, f"{arm['hit_rate']:.0%}", moved, stall])
    return title + "\n\n" + _table(rows)


def transfers_table(rates: list[Found]) -> str:
    """GB/s by size and way, and the share of the best way at that size."""
    rows = [["experts of", "MB", "way", "GB/s", "of the best"]]
    for rate in rates:
        best = max(other["bytes_per_s"] for other in rates if other["shape"] == rate["shape"])
        gb, share = f"{rate['bytes_per_s'] / 1e9:.1f}", f"{rate['bytes_per_s'] / best:.0%}"
        rows.append([rate["shape"], f"{rate['row_bytes'] / 1e6:.2f}", rate["way"], gb, share])
    fastest = max(rate["bytes_per_s"] for rate in rates if rate["way"].startswith("copy engine"))
    verdict = "met" if fastest >= COPY_TARGET else "missed"
    return _table(rows) + f"\n\nCopy engine at best {fastest / 1e9:.1f} GB/s; target {COPY_TARGET / 1e9:.0f}: {verdict}."


def _versions(found: Found) -> str:
    versions = found["provenance"]["versions"]
    return ", ".join(f"{package} {versions[package]}" for package in ("torch", "triton", "transformers") if package in versions)


def _table(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    sys.exit(main())
