"""Expert kernels at real shapes: microseconds of every provider beside the roof, which only reads the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.read_only import read_rows
from scripts.gpu.forked import first_line
from scripts.gpu.providers import OURS, PROVIDERS, Problem, distinct, make_problem, reference
from scripts.gpu.shapes import MoEShape
from scripts.gpu.timing import Calls, Timing, time_in_turn

FEWEST_SETS = 4  # of weights, in turn
TIMES_L2 = 3  # all sets together are more than L2 holds
MAX_ERROR = 2e-2  # relative norm against fp32: of 16-bit experts with 16-bit intermediates
MAX_DECODE_BYTES = 20e9  # weights that one token after the other would read: not what that kernel is for
ROOF = "read_only"


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
    error: float | None = None  # relative norm, of the very configuration that is timed
    tolerance: float = MAX_ERROR
    ours_us: float | None = None  # beside a peer: ours, in turn with it

    @property
    def right(self) -> bool | None:
        """Whether what is timed is right; None where there is nothing to compare."""
        return None if self.error is None else self.error <= self.tolerance

    @property
    def share_of_roof(self) -> float | None:
        """The roof's time over this one's: 1 = as fast as reading the weights."""
        return None if self.timing is None or self.roof_us is None else self.roof_us / self.timing.us


def kernel_times(shape: MoEShape, n_tokens: int, dtype: torch.dtype) -> Iterator[KernelTime]:
    """All providers at one shape, the roof first; what does not fit is said to be skipped."""
    row_bytes = shape.geometry(dtype).row_bytes
    n_sets = sets_needed(shape.expected_touched(n_tokens) * row_bytes, torch.cuda.get_device_properties(0).L2_cache_size)
    n_bytes, free_bytes = 2 * n_sets * shape.n_experts * row_bytes, torch.cuda.mem_get_info()[0]
    if 1.2 * n_bytes > free_bytes:
        reason = f"{n_sets} sets of weights take {n_bytes / 1e9:.0f} GB, {free_bytes / 1e9:.0f} GB are free"
        yield from (KernelTime(shape.name, n_tokens, name, None, math.nan, None, reason) for name in PROVIDERS)
        return
    problems = [make_problem(shape, n_tokens, dtype, "cuda", seed) for seed in range(n_sets)]
    touched = [distinct(p.ids) for p in problems]
    touched_bytes = sum(map(len, touched)) / n_sets * row_bytes
    free_bytes, _ = torch.cuda.mem_get_info()
    calls = {}
    for name, prepare in PROVIDERS.items():
        unfit = too_much(name, shape.top_k * n_tokens, row_bytes, free_bytes)
        if unfit is None:
            calls[name] = [prepare(p) for p in problems]
        else:
            yield KernelTime(shape.name, n_tokens, name, None, touched_bytes, None, unfit)
    roof = [reader(p.table.pools[0], slots) for p, slots in zip(problems, touched, strict=True)]
    about = Timed("experts", shape.name, n_tokens, touched_bytes)
    yield from times_beside_roof(about, roof, calls, reference(problems[0]), MAX_ERROR)


def sets_needed(bytes_a_call: float, l2_bytes: int) -> int:
    """How many sets of weights must take turns so that none is in L2 when it comes again."""
    return max(FEWEST_SETS, math.ceil(TIMES_L2 * l2_bytes / bytes_a_call))


def too_much(provider: str, n_pairs: int, row_bytes: int, free_bytes: int) -> str | None:
    """Why `provider` is not asked to compute so many (token, expert) pairs."""
    n_bytes = n_pairs * row_bytes
    if provider == "transformers_batched_mm" and n_bytes > free_bytes / 3:
        return f"gathers {n_bytes / 1e9:.0f} GB of weights, {free_bytes / 1e9:.0f} GB are free"
    if provider == "ours_decode" and n_bytes > MAX_DECODE_BYTES:
        return f"would read {n_bytes / 1e9:.0f} GB, an expert for each of its tokens: grouped_mlp is for that"
    return None


@dataclass(frozen=True)
class Timed:
    """What is timed."""

    operation: str
    shape: str
    n_tokens: int
    touched_bytes: float  # mean over the sets; 0 where next to nothing is read


def times_beside_roof(
    about: Timed,
    roof: Calls,
    providers: Mapping[str, Calls],
    expected: Tensor | None,
    tolerance: float,
) -> Iterator[KernelTime]:
    """Check each provider once against `expected`, then time them in turn: first the roof (where there is one) and ours, then the peers,
    of which one may break the process, with ours once more among them.

    Args:
        expected: what the first call of those providers returns that return a tensor; None checks nothing.
        tolerance: of the relative norm.
    """
    ours = {name: calls for name, calls in providers.items() if name.startswith("ours")}
    peers = {name: calls for name, calls in providers.items() if name not in ours}
    alone = dict(_timed_in_turn(({ROOF: roof} if roof else {}) | ours, expected))
    roof_us = alone[ROOF].us if roof else None
    for name, outcome in alone.items():
        yield _row(about, name, outcome, tolerance, roof_us)
    if not peers:
        return
    beside = dict(_timed_in_turn({n: calls for n, calls in ours.items() if n == "ours"} | peers, expected))
    ours_us = beside.pop("ours").us if "ours" in ours else None
    for name, outcome in beside.items():
        yield _row(about, name, outcome, tolerance, roof_us, ours_us)


@dataclass(frozen=True)
class Outcome:
    """Of one provider: its timing, or why there is none."""

    timing: Timing | str
    error: float | None

    @property
    def us(self) -> float | None:
        return None if isinstance(self.timing, str) else self.timing.us


def _timed_in_turn(group: Mapping[str, Calls], expected: Tensor | None) -> Iterator[tuple[str, Outcome]]:
    checked = {name: _error(calls[0], None if name == ROOF else expected) for name, calls in group.items()}
    for name, timing in time_in_turn({n: calls for n, calls in group.items() if not isinstance(checked[n], str)}):
        error = checked[name]
        yield name, Outcome(timing, error if isinstance(error, float) else None)
    for name, reason in checked.items():
        if isinstance(reason, str):
            yield name, Outcome(reason, None)


def _row(
    about: Timed, name: str, outcome: Outcome, tolerance: float, roof_us: float | None, ours_us: float | None = None
) -> KernelTime:
    timing, reason = (None, outcome.timing) if isinstance(outcome.timing, str) else (outcome.timing, None)
    return KernelTime(
        about.shape, about.n_tokens, name, timing, about.touched_bytes, roof_us, reason, about.operation, outcome.error, tolerance, ours_us
    )  # fmt: skip


def _error(call: Callable[[], object], expected: Tensor | None) -> float | str | None:
    """Relative norm of what the call returns, why it cannot run, or None where it returns nothing to compare."""
    try:
        found = call()
        if expected is None or not isinstance(found, Tensor):
            return None
        return float((found.double() - expected.double()).norm() / expected.double().norm())
    except Exception as failure:  # what a peer raises on this machine belongs in the table
        return first_line(failure)


def reader(rows: Tensor, slots: Tensor) -> Callable[[], Tensor]:
    """The roof: read rows `slots` (int32) of `rows`, uint8 [n, bytes]."""
    return lambda: read_rows(rows, slots)


def rehearse_kernel_times(shape: MoEShape, n_tokens: int, dtype: torch.dtype) -> None:
    """Launch what `kernel_times` launches, on tensors without memory."""
    p: Problem = make_problem(shape, n_tokens, dtype, "meta", 0)
    reader(p.table.pools[0], distinct(p.ids))()
    for name in (*OURS, "sorted_padded"):
        PROVIDERS[name](p)()
