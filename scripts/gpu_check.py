"""Check the kernels on a GPU, then time them: correctness first, every peer beside ours, the roof beside all.

    python -m scripts.gpu_check                       # all shapes, under 9 minutes on an H200
    python -m scripts.gpu_check --shapes OLMoE-1B-7B  # some

Prints tables and writes docs/results/gpu/<device>.json with hardware, versions and every number, anew after each section: a stop
loses nothing. What does not fit the card or the time is skipped and says why. `python -m scripts.gpu_tables` makes Markdown of the JSON.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.atomic import write_json
from experiments.provenance import provenance
from kernels.quantised import QuantFormat
from prefetch.device import limit_memory
from scripts.gpu.bundled_tokens import bundled_tokens
from scripts.gpu.correctness import SMALL, Verdict, verdicts
from scripts.gpu.decode_model import DECODE_SHAPES, DecodeShape
from scripts.gpu.decode_scene import RECALL, Machine, Setting
from scripts.gpu.kernel_times import KernelTime, kernel_times
from scripts.gpu.offloaded_decode import ArmSpeed, decode_speeds
from scripts.gpu.operation_times import operation_times, operation_verdicts
from scripts.gpu.providers import OURS, PROVIDERS
from scripts.gpu.shapes import SHAPES, MoEShape
from scripts.gpu.transfers import TransferRate, transfer_rates

PEERS = frozenset(PROVIDERS) - frozenset(OURS)
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "gpu"
DTYPE = torch.bfloat16
TARGETS = {  # (operation, shape, tokens): us on an H200, graph replay; of experts both GEMMs
    ("experts", "Qwen3-30B-A3B", 1): 22.0,
    ("experts", "Qwen3-30B-A3B", 8): 140.0,
    ("experts", "Qwen3-30B-A3B", 64): 350.0,
    ("experts", "Mixtral-8x7B", 1): 205.0,
    ("experts", "Qwen3.6-35B-A3B", 1): 17.0,
    ("router", "Qwen3-30B-A3B", 1): 3.0,
    ("router with 4 heads", "Qwen3-30B-A3B", 1): 5.0,
    ("predict_mlp", "Qwen3-30B-A3B", 1): 10.0,
    ("cache_plan", "Qwen3-30B-A3B", 1): 4.0,
}
COPY_TARGET = 52e9  # bytes/s of the copy engine
CARD_BYTES = 12_000_000_000  # of the card that offloaded decoding stands in for
DECODED = (None, QuantFormat("int4", 64))  # formats of the experts there

console = Console(stderr=True)


def main() -> None:
    options = _options()
    if not torch.cuda.is_available():
        sys.exit(
            "error: no CUDA device: this script measures GPU kernels; without one, make test checks them in the interpreter"
        )
    path = options.out or RESULTS / f"{re.sub(r'[^A-Za-z0-9]+', '-', torch.cuda.get_device_name())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = [shape for shape in SHAPES if options.shapes is None or shape.name in options.shapes]
    end_s = time.monotonic() + 60 * options.minutes
    about = {
        "device": torch.cuda.get_device_name(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "dtype": str(DTYPE).removeprefix("torch."),
        "provenance": provenance(seed=0),
    }
    found = run_sections(sections(shapes, end_s), path, about, end_s)
    console.print(f"results: {path}")
    for name, reason in found["skipped"].items():
        console.print(f"skipped {name}: {reason}", markup=False)
    if not all(verdict["passed"] for verdict in found.get("correctness", []) if verdict["provider"] not in PEERS):
        sys.exit("error: a kernel of this project is wrong on this GPU; see correctness in the results")


@dataclass(frozen=True)
class Section:
    """A part of the check: its key in the JSON, and what makes its value."""

    name: str
    run: Callable[[], Any]


def sections(shapes: list[MoEShape], end_s: float) -> list[Section]:
    """Correctness first; then what most depends on, so that a short lease has it."""

    def out_of_time() -> bool:
        return time.monotonic() > end_s

    return [
        Section("correctness", correctness),
        Section("tokens", lambda: bundled_tokens(torch.device("cuda"))),
        *(Section(f"kernels {shape.name}", partial(_kernel_times, shape, out_of_time)) for shape in shapes[:2]),
        Section("transfers", lambda: _transfers(shapes)),
        *(
            Section(f"decode {shape.moe.name} {how or 'bfloat16'}", partial(_decode, shape, how))
            for shape in DECODE_SHAPES
            if shape.moe in shapes
            for how in DECODED
        ),
        *(Section(f"kernels {shape.name}", partial(_kernel_times, shape, out_of_time)) for shape in shapes[2:]),
    ]


def run_sections(
    sections: list[Section], path: Path, about: dict[str, Any], end_s: float, clock: Callable[[], float] = time.monotonic
) -> dict[str, Any]:
    """Run all that time allows, and write everything so far to `path` after each; a section that fails is noted, and the next begun."""
    found: dict[str, Any] = about | {"skipped": {}}
    for section in sections:
        if clock() > end_s:
            found["skipped"][section.name] = "out of time"
            continue
        console.print(f"{section.name} ...")
        try:
            found[section.name] = section.run()
        except Exception as failure:  # the other sections' numbers must not be lost with this one
            found["skipped"][section.name] = f"{type(failure).__name__}: {failure}".splitlines()[0]
        write_json(path, found)
    write_json(path, found)
    return found


def correctness() -> list[dict[str, Any]]:
    """Every provider and every operation against float64; operations in fewer variants, since each has to be compiled."""
    right = verdicts("cuda", tokens=(1, 40)) + operation_verdicts("cuda", SMALL[1:2], (1, 5))
    _print_verdicts(right)
    return [asdict(v) | {"passed": v.passed} for v in right]


def _kernel_times(shape: MoEShape, out_of_time: Callable[[], bool]) -> dict[str, Any]:
    times = list(kernel_times(shape, DTYPE, out_of_time)) + list(operation_times(shape, DTYPE, out_of_time))
    for operation in dict.fromkeys(t.operation for t in times):
        _print_times(f"{shape.name}, {operation}", [t for t in times if t.operation == operation])
    return {"times": [asdict(t) | {"share_of_roof": t.share_of_roof} for t in times], "targets": targets(times)}


def _transfers(shapes: list[MoEShape]) -> list[dict[str, Any]]:
    rates = [rate for shape in shapes for rate in transfer_rates(shape, DTYPE)]
    _print_rates(rates)
    return [asdict(rate) for rate in rates]


def _decode(shape: DecodeShape, how: QuantFormat | None) -> dict[str, Any]:
    setting = Setting(shape, how, CARD_BYTES)
    torch.cuda.empty_cache()  # what earlier sections have left would count against the limit
    limit_memory(torch.device("cuda"), min(CARD_BYTES, torch.cuda.get_device_properties(0).total_memory))
    try:
        speeds = list(decode_speeds(Machine(torch.device("cuda")), setting))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    _print_speeds(speeds)
    return {
        "setting": asdict(setting) | {"dtype": str(setting.dtype)},
        "recall": RECALL,
        "arms": [asdict(speed) for speed in speeds],
    }


def targets(times: list[KernelTime]) -> list[dict[str, Any]]:
    """What was aimed at beside what was measured; `us` and `met` are None where it was not measured."""
    measured = {(t.operation, t.shape, t.n_tokens): t.timing.us for t in times if t.provider == "ours" and t.timing is not None}
    found = []
    for (operation, shape, n_tokens), target_us in TARGETS.items():
        us = measured.get((operation, shape, n_tokens))
        met = None if us is None else us <= target_us
        found.append(
            {"operation": operation, "shape": shape, "n_tokens": n_tokens, "target_us": target_us, "us": us, "met": met}
        )
    return found


def _print_times(title: str, found: list[KernelTime]) -> None:
    table = Table(title=f"{title}, {str(DTYPE).removeprefix('torch.')}, us (% of the roof)")
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


def _print_speeds(speeds: list[ArmSpeed]) -> None:
    table = Table(title=f"Offloaded decoding, {speeds[0].model}, experts in {speeds[0].experts}, generated weights and routing")
    for heading in ("arm", "driven by", "slots", "tokens/s", "hits", "MB/token", "stall ms/token"):
        table.add_column(heading, justify="right")
    for s in speeds:
        if s.tokens_per_s is None:
            table.add_row(s.arm, s.driven_by, str(s.n_slots), "not measured", "", "", s.skipped or "")
            continue
        rate = f"{s.tokens_per_s:.1f} [{s.lowest:.1f}, {s.highest:.1f}]"
        stall = "" if s.stall_s_per_token is None else f"{1e3 * s.stall_s_per_token:.2f}"
        moved = f"{(s.moved_bytes_per_token or 0) / 1e6:.0f}"
        table.add_row(s.arm, s.driven_by, str(s.n_slots), rate, f"{100 * (s.hit_rate or 0):.0f}%", moved, stall)
    console.print(table)


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
    for heading in ("model", "way", "MB an expert", "GB/s", "of the best"):
        table.add_column(heading)
    for rate in rates:
        best = max(other.bytes_per_s for other in rates if other.shape == rate.shape)
        gb, share = f"{rate.bytes_per_s / 1e9:.1f}", f"{rate.bytes_per_s / best:.0%}"
        table.add_row(rate.shape, rate.way, f"{rate.row_bytes / 1e6:.2f}", gb, share)
    console.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in SHAPES], help="models to time; all by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="after so long no further shape is begun")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
