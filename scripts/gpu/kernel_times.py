"""Expert kernels at real shapes: microseconds of every provider beside the roof, which only reads the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kernels.read_only import read_rows
from scripts.gpu.providers import PROVIDERS, Problem, make_problem
from scripts.gpu.shapes import TOKENS, MoEShape
from scripts.gpu.timing import Timing, time_calls

N_SETS = 4  # of weights, in turn: more than L2 holds


@dataclass(frozen=True)
class KernelTime:
    """One provider at one shape. `skipped` says why there is no time."""

    shape: str
    n_tokens: int
    provider: str
    timing: Timing | None
    touched_bytes: float  # of weights, mean over the sets
    roof_us: float | None
    skipped: str | None = None
    operation: str = "experts"

    @property
    def share_of_roof(self) -> float | None:
        """The roof's time over this one's: 1 = as fast as reading the weights."""
        return None if self.timing is None or self.roof_us is None else self.roof_us / self.timing.us


def kernel_times(shape: MoEShape, dtype: torch.dtype, deadline: Callable[[], bool]) -> Iterator[KernelTime]:
    """All token counts and providers of one shape; what comes after the deadline, or does not fit, is said to be skipped."""
    n_bytes = 2 * N_SETS * shape.n_experts * shape.geometry(dtype).row_bytes
    torch.cuda.empty_cache()  # what an earlier shape has left would count as taken
    free_bytes, _ = torch.cuda.mem_get_info()
    for n_tokens in TOKENS:
        reason = None
        if 1.2 * n_bytes > free_bytes:
            reason = f"{N_SETS} sets of weights take {n_bytes / 1e9:.0f} GB, {free_bytes / 1e9:.0f} GB are free"
        elif deadline():
            reason = "out of time"
        if reason is not None:
            yield from (KernelTime(shape.name, n_tokens, name, None, float("nan"), None, reason) for name in PROVIDERS)
            continue
        yield from _times_of([make_problem(shape, n_tokens, dtype, "cuda", seed) for seed in range(N_SETS)], shape, n_tokens)


def _times_of(problems: list[Problem], shape: MoEShape, n_tokens: int) -> Iterator[KernelTime]:
    touched = [p.touched for p in problems]
    row_bytes = problems[0].table.geometry.row_bytes
    touched_bytes = sum(len(slots) for slots in touched) / len(touched) * row_bytes
    roof = time_calls([_reader(p, slots) for p, slots in zip(problems, touched, strict=True)])
    yield KernelTime(shape.name, n_tokens, "read_only", roof, touched_bytes, roof.us)
    for name, provider in PROVIDERS.items():
        try:
            timing = time_calls([_caller(provider, p) for p in problems])
        except Exception as failure:  # a peer that cannot run here must not end the run
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
            yield KernelTime(shape.name, n_tokens, name, None, touched_bytes, roof.us, reason)
        else:
            yield KernelTime(shape.name, n_tokens, name, timing, touched_bytes, roof.us)


def _reader(p: Problem, slots: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: read_rows(p.table.pools[0], slots)


def _caller(provider: Callable[[Problem], torch.Tensor], p: Problem) -> Callable[[], torch.Tensor]:
    return lambda: provider(p)
