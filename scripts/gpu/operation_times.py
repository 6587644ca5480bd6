"""The operations beside the expert MLP: first right, then timed, beside PyTorch and beside reading their weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kernels.read_only import read_rows
from scripts.gpu.correctness import SMALL, TOKENS, TOLERANCES, Verdict
from scripts.gpu.kernel_times import N_SETS, KernelTime
from scripts.gpu.operations import Case, operations
from scripts.gpu.shapes import TOKENS as TIMED_TOKENS
from scripts.gpu.shapes import MoEShape
from scripts.gpu.timing import time_calls


def operation_verdicts(device: str, shapes: tuple[MoEShape, ...] = SMALL, tokens: tuple[int, ...] = TOKENS) -> list[Verdict]:
    """All operations, dtypes, shapes and token counts against float64, or where all is integers, to the last bit."""
    found = []
    for name, make in operations().items():
        for shape in shapes:
            for dtype, tolerance in TOLERANCES.items():
                for n_tokens in tokens:
                    case = make(shape, n_tokens, dtype, device, n_tokens)
                    if case is not None:
                        label = str(dtype).removeprefix("torch.")
                        found.append(Verdict(name, shape.name, n_tokens, label, *_error(case, tolerance)))
    return found


def _error(case: Case, tolerance: float) -> tuple[float | None, float, str | None]:
    """Relative norm, what is allowed of it, and why it could not run."""
    try:
        ours, exact = case.ours().double(), case.exact().double()
    except Exception as failure:  # what a compiler or driver raises on this machine belongs in the table
        return None, tolerance, f"{type(failure).__name__}: {failure}".splitlines()[0]
    return float((ours - exact).norm() / exact.norm()), tolerance, None


def operation_times(shape: MoEShape, dtype: torch.dtype, out_of_time: Callable[[], bool]) -> Iterator[KernelTime]:
    """Every operation and token count of one shape; what comes after the deadline, or cannot run, is said to be skipped."""
    for name, make in operations().items():
        for n_tokens in TIMED_TOKENS:
            if out_of_time():
                yield KernelTime(shape.name, n_tokens, "ours", None, float("nan"), None, "out of time", name)
                continue
            try:
                cases = [make(shape, n_tokens, dtype, "cuda", seed) for seed in range(N_SETS)]
            except torch.OutOfMemoryError:  # a small card must not lose what was timed before
                yield KernelTime(shape.name, n_tokens, "ours", None, float("nan"), None, "out of device memory", name)
                continue
            yield from _times_of([case for case in cases if case is not None], name, shape, n_tokens)


def _times_of(cases: list[Case], name: str, shape: MoEShape, n_tokens: int) -> Iterator[KernelTime]:
    if not cases:
        return
    n_bytes = sum(case.reads.numel() for case in cases if case.reads is not None) / len(cases)
    roof_us = time_calls([_reader(case.reads) for case in cases if case.reads is not None]).us if n_bytes else None
    providers = {"ours": [case.ours for case in cases]} | {
        peer: [case.peers[peer] for case in cases] for peer in cases[0].peers
    }
    for provider, calls in providers.items():
        try:
            yield KernelTime(shape.name, n_tokens, provider, time_calls(calls), n_bytes, roof_us, None, name)
        except Exception as failure:  # one that cannot run here must not end the run
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
            yield KernelTime(shape.name, n_tokens, provider, None, n_bytes, roof_us, reason, name)


def _reader(rows: torch.Tensor) -> Callable[[], torch.Tensor]:
    slots = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    return lambda: read_rows(rows, slots)
