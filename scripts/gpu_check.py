"""Check the kernels on a GPU, then time them: correctness first, every peer beside ours, the roof beside all.

    python -m scripts.gpu_check                       # all shapes, under 9 minutes on an H200
    python -m scripts.gpu_check --shapes OLMoE-1B-7B  # some

Prints a table and writes docs/results/gpu/<device>.json with hardware, versions and every number. What does not fit the
card or the time is skipped and says why. Not covered yet: offloaded decoding, since the runtime has no CUDA path.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.atomic import write_json
from experiments.provenance import provenance
from scripts.gpu.correctness import Verdict, verdicts
from scripts.gpu.kernel_times import KernelTime, kernel_times
from scripts.gpu.providers import OURS
from scripts.gpu.shapes import SHAPES, MoEShape
from scripts.gpu.transfers import TransferRate, transfer_rates

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "gpu"
DTYPE = torch.bfloat16
TARGETS_US = {  # on an H200, both GEMMs, graph replay
    ("Qwen3-30B-A3B", 1): 22.0,
    ("Qwen3-30B-A3B", 8): 140.0,
    ("Qwen3-30B-A3B", 64): 350.0,
    ("Mixtral-8x7B", 1): 205.0,
    ("Qwen3.6-35B-A3B", 1): 17.0,
}

console = Console(stderr=True)


def main() -> None:
    options = _options()
    if not torch.cuda.is_available():
        sys.exit(
            "error: no CUDA device: this script measures GPU kernels; without one, make test checks them in the interpreter"
        )
    shapes = [shape for shape in SHAPES if options.shapes is None or shape.name in options.shapes]
    found = check(shapes, time.monotonic() + 60 * options.minutes)
    path = options.out or RESULTS / f"{re.sub(r'[^A-Za-z0-9]+', '-', torch.cuda.get_device_name())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    console.print(f"results: {path}")
    if not all(verdict["passed"] for verdict in found["correctness"] if verdict["provider"] in OURS):
        sys.exit("error: a kernel of this project is wrong on this GPU; see correctness in the results")


def check(shapes: list[MoEShape], end_s: float) -> dict[str, Any]:
    """Everything, as one JSON value: correctness, kernel times, transfer rates, targets, provenance."""

    def out_of_time() -> bool:
        return time.monotonic() > end_s

    console.print("correctness ...")
    right = verdicts("cuda")
    _print_verdicts(right)
    times = [found for shape in shapes for found in _announced(shape, out_of_time)]
    rates = [rate for shape in shapes for rate in transfer_rates(shape, DTYPE)]
    _print_rates(rates)
    return {
        "device": torch.cuda.get_device_name(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "dtype": str(DTYPE).removeprefix("torch."),
        "correctness": [asdict(v) | {"passed": v.passed} for v in right],
        "kernels": [asdict(t) | {"share_of_roof": t.share_of_roof} for t in times],
        "transfers": [asdict(rate) for rate in rates],
        "targets": targets(times),
        "provenance": provenance(seed=0),
    }


def targets(times: list[KernelTime]) -> list[dict[str, Any]]:
    """What was aimed at beside what was measured; `us` is None where it was not measured."""
    measured = {(t.shape, t.n_tokens): t.timing.us for t in times if t.provider == "ours" and t.timing is not None}
    return [
        {"shape": shape, "n_tokens": n_tokens, "target_us": target_us, "us": measured.get((shape, n_tokens))}
        for (shape, n_tokens), target_us in TARGETS_US.items()
    ]


def _announced(shape: MoEShape, out_of_time: Callable[[], bool]) -> list[KernelTime]:
    console.print(f"{shape.name} ...")
    found = list(kernel_times(shape, DTYPE, out_of_time))
    table = Table(title=f"{shape.name}, {str(DTYPE).removeprefix('torch.')}, us (% of the roof)")
    table.add_column("tokens", justify="right")
    providers = list(dict.fromkeys(t.provider for t in found))
    for provider in providers:
        table.add_column(provider, justify="right")
    for n_tokens in dict.fromkeys(t.n_tokens for t in found):
        cells = {t.provider: _cell(t) for t in found if t.n_tokens == n_tokens}
        table.add_row(str(n_tokens), *(cells.get(provider, "") for provider in providers))
    console.print(table)
    for reason in dict.fromkeys(f"{t.provider}: {t.skipped}" for t in found if t.skipped):
        console.print(f"  skipped {reason}", markup=False)
    return found


def _cell(found: KernelTime) -> str:
    if found.timing is None:
        return "-"
    eager = "" if found.timing.captured else " eager"
    return f"{found.timing.us:.1f} ({100 * (found.share_of_roof or 0):.0f}%){eager}"


def _print_verdicts(found: list[Verdict]) -> None:
    table = Table(title="Correctness: relative error against float64, worst case")
    for heading in ("provider", "passed", "float32", "float16", "bfloat16", "could not run"):
        table.add_column(heading)
    for provider in dict.fromkeys(v.provider for v in found):
        mine = [v for v in found if v.provider == provider]
        worst = {d: max((v.error for v in mine if v.dtype == d and v.error is not None), default=None) for d in _dtypes(mine)}
        passed = f"{sum(v.passed for v in mine)} of {len(mine)}"
        refusals = "; ".join(dict.fromkeys(v.problem for v in mine if v.problem))
        table.add_row(provider, passed, *(f"{e:.1e}" if e is not None else "-" for e in worst.values()), refusals[:60])
    console.print(table)


def _dtypes(found: list[Verdict]) -> list[str]:
    return list(dict.fromkeys(v.dtype for v in found))


def _print_rates(rates: list[TransferRate]) -> None:
    table = Table(title="Experts from pinned memory")
    for heading in ("model", "way", "MB an expert", "GB/s"):
        table.add_column(heading)
    for rate in rates:
        table.add_row(rate.shape, rate.way, f"{rate.row_bytes / 1e6:.2f}", f"{rate.bytes_per_s / 1e9:.1f}")
    console.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in SHAPES], help="models to time; all by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="after so long no further shape is begun")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
