"""First of all: every provider computes the same, and right, against float64 arithmetic on the same rounded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.moe_call import MoECall, moe_mlp_reference
from scripts.gpu.forked import first_line
from scripts.gpu.providers import OURS, PROVIDERS, Prepare, Problem, make_problem
from scripts.gpu.shapes import MoEShape

SMALL = (MoEShape("fine-grained", 256, 16, 4, 96, 1), MoEShape("coarse", 512, 4, 2, 256, 1), MoEShape("odd", 328, 7, 3, 72, 1))
TOKENS = (1, 5, 40)
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of a whole MLP, relative norm


@dataclass(frozen=True)
class Verdict:
    """One provider on one problem; `error` is the relative norm, `problem` why it could not run at all."""

    provider: str
    shape: str
    n_tokens: int
    dtype: str
    error: float | None
    tolerance: float
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.tolerance


def verdicts(device: str, shapes: Iterable[MoEShape] = SMALL, tokens: tuple[int, ...] = TOKENS) -> Iterator[Verdict]:
    """All providers, dtypes, shapes and token counts. A provider that refuses says why; a wrong one is not passed."""
    for shape in shapes:
        for dtype, tolerance in TOLERANCES.items():
            for n_tokens in tokens:
                labels = shape.name, n_tokens, name_of(dtype)
                try:
                    p = make_problem(shape, n_tokens, dtype, device, seed=n_tokens)
                    expected, _ = moe_mlp_reference(MoECall(p.x, p.ids, p.weights, p.table, 0), torch.float64)
                except Exception as failure:  # one problem that does not fit must not lose the others
                    yield from (Verdict(name, *labels, None, tolerance, first_line(failure)) for name in PROVIDERS)
                    continue
                for name, prepare in PROVIDERS.items():
                    yield Verdict(name, *labels, *compared(_prepared(prepare, p), expected, tolerance))


def _prepared(prepare: Prepare, p: Problem) -> Callable[[], Tensor]:
    return lambda: prepare(p)()


def compared(found: Callable[[], Tensor], expected: Tensor, tolerance: float) -> tuple[float | None, float, str | None]:
    """Relative norm, what is allowed of it (nothing where all is integers), and why it could not run."""
    allowed = tolerance if expected.is_floating_point() else 0.0
    try:
        exact = expected.double()
        error = float((found().double() - exact).norm() / exact.norm())
    except Exception as failure:  # whatever a compiler or driver raises on this machine belongs in the table
        return None, allowed, first_line(failure)
    return error, allowed, None


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def rehearse_verdicts(shapes: Iterable[MoEShape], tokens: tuple[int, ...]) -> None:
    """Launch what `verdicts` launches, on tensors without memory."""
    for shape in shapes:
        for dtype in TOLERANCES:
            for n_tokens in tokens:
                p = make_problem(shape, n_tokens, dtype, "meta", 0)
                for name in (*OURS, "sorted_padded"):
                    PROVIDERS[name](p)()
