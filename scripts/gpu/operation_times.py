"""The operations beside the expert MLP: first right, then timed, beside PyTorch and beside reading their weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from scripts.gpu.case import Case, MakeCase
from scripts.gpu.correctness import SMALL, TOKENS, TOLERANCES, Verdict, compared, name_of
from scripts.gpu.forked import first_line
from scripts.gpu.kernel_times import MAX_ERROR, KernelTime, Timed, reader, sets_needed, times_beside_roof
from scripts.gpu.operations import operations, timed_operations
from scripts.gpu.plans import plan_times, rehearse_plan_times
from scripts.gpu.shapes import MoEShape
from scripts.gpu.timing import Calls

MOST_SETS = 256  # of small weights


def operation_verdicts(
    name: str, device: str, shapes: Iterable[MoEShape] = SMALL, tokens: tuple[int, ...] = TOKENS
) -> Iterator[Verdict]:
    """One operation in all dtypes, shapes and token counts against float64, or where all is integers, to the last bit."""
    for shape in shapes:
        for dtype, tolerance in TOLERANCES.items():
            for n_tokens in tokens:
                labels = name, shape.name, n_tokens, name_of(dtype)
                try:
                    case = operations()[name](shape, n_tokens, dtype, device, n_tokens)
                    outcome = None if case is None else compared(case.ours, case.exact(), tolerance)
                except Exception as failure:  # one that does not fit must not lose the others
                    outcome = None, tolerance, first_line(failure)
                if outcome is not None:
                    yield Verdict(*labels, *outcome)


def operation_times(shape: MoEShape, n_tokens: int, dtype: torch.dtype) -> Iterator[KernelTime]:
    """Every operation at one shape; what cannot run is said to be skipped."""
    for name, make in timed_operations().items():
        try:
            cases = _cases(make, shape, n_tokens, dtype)
        except Exception as failure:  # a small card must not lose the other operations
            yield KernelTime(shape.name, n_tokens, "ours", None, float("nan"), None, first_line(failure), name)
        else:
            yield from _times_of(cases, name, shape, n_tokens)
    yield from plan_times(shape, n_tokens)


def rehearse_operation_verdicts(name: str, shapes: Iterable[MoEShape], tokens: tuple[int, ...]) -> None:
    """Launch what `operation_verdicts` launches, on tensors without memory."""
    for shape in shapes:
        for dtype in TOLERANCES:
            for n_tokens in tokens:
                _rehearse(operations()[name](shape, n_tokens, dtype, "meta", 0), with_roof=False)


def rehearse_operation_times(shape: MoEShape, n_tokens: int, dtype: torch.dtype) -> None:
    """Launch what `operation_times` launches, on tensors without memory."""
    for make in timed_operations().values():
        _rehearse(make(shape, n_tokens, dtype, "meta", 0), with_roof=True)
    rehearse_plan_times(shape, n_tokens)


def _rehearse(case: Case | None, with_roof: bool) -> None:
    if case is None:
        return
    case.ours()
    if with_roof and case.reads is not None:
        reader(*case.reads)()


def _cases(make: MakeCase, shape: MoEShape, n_tokens: int, dtype: torch.dtype) -> list[Case]:
    """As many as L2 cannot hold; none where the operation does not apply."""
    first = make(shape, n_tokens, dtype, "cuda", 0)
    if first is None:
        return []
    n_sets = sets_needed(_bytes(first), torch.cuda.get_device_properties(0).L2_cache_size)
    others = (make(shape, n_tokens, dtype, "cuda", seed) for seed in range(1, min(n_sets, MOST_SETS)))
    return [first, *(case for case in others if case is not None)]


def _bytes(case: Case) -> int:
    assert case.reads is not None, "every timed operation says what it reads"
    rows, slots = case.reads
    return len(slots) * rows.shape[1]


def _times_of(cases: list[Case], name: str, shape: MoEShape, n_tokens: int) -> Iterator[KernelTime]:
    if not cases:
        return
    about = Timed(name, shape.name, n_tokens, sum(map(_bytes, cases)) / len(cases))
    roof = [reader(*case.reads) for case in cases if case.reads is not None]
    providers: dict[str, Calls] = {"ours": [case.ours for case in cases]}
    providers |= {peer: [case.peers[peer] for case in cases] for peer in cases[0].peers}
    yield from times_beside_roof(about, roof, providers, cases[0].exact(), MAX_ERROR)
