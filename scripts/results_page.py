"""Put what `make results` measured into docs/results and between the markers of docs/results.md and README.md.

    python -m scripts.results_page outputs/results

Figures are copied by this program alone, so that no page shows a number that no run wrote. What they mean is written by hand,
outside the markers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from experiments.atomic import write_text
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
    blocks |= {"conditions": conditions(bench["provenance"]), "bench": bench_table(bench)}
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


def bench_table(bench: dict[str, Any]) -> str:
    """The figures of `experiments.bench` beside their targets, and where the runtime's own time goes."""
    exact, rounded, resident = bench["exactness_float32"], bench["exactness_bfloat16"], bench["resident_speed"]
    tpot_s, fastest = resident["tpot_s"], resident["fastest_of_transformers"]
    rows = [
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
            f"{_gb(bench['transfers']['transfers_bytes_per_s'])} against {_gb(bench['transfers']['bare_bytes_per_s'])} GB/s: "
            f"{bench['transfers']['share_median']:.0%}",
            ">= 85 %",
        ),
        (
            "oracle's time per token, against the longer of moving and computing",
            f"{bench['overlap']['to_own_median']:.2f} x with computing as in the same run, {bench['overlap']['to_resident_median']:.2f} x with "
            "computing as with everything resident",
            "<= 1.15",
        ),
        (
            "runtime overhead per layer call, no miss, no predictor",
            f"{bench['overhead']['overhead_us_median']:.0f} us beside {bench['overhead']['expert_us_median']:.0f} us of expert arithmetic",
            "shown",
        ),
    ]
    table = ["| what | measured | target |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    profile = [
        f"| `{row['function']}` | {row['self_us_per_call']:.1f} | {row['calls']} |"
        for row in bench["overhead"]["profile_self_time"][:6]
    ]
    return "\n".join([*table, "", PROFILE_CAPTION, "", "| function | us per call | calls |", "|---|---|---|", *profile])


ACCELERATE = {"page_cache": "its files in the page cache", "from_disk": "its files read from the disk"}
PROFILE_CAPTION = "The runtime's own functions that take most of a profiled decode (self time; profiling inflates it):"


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


def _read_bench(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read ({error}); make results writes it") from error
    return found


if __name__ == "__main__":
    sys.exit(main())
