"""First of all: every provider computes the same, and right, against float64 arithmetic on the same rounded weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.moe_call import MoECall, moe_mlp_reference
from scripts.gpu.providers import PROVIDERS, make_problem
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


def verdicts(device: str, shapes: tuple[MoEShape, ...] = SMALL, tokens: tuple[int, ...] = TOKENS) -> list[Verdict]:
    """All providers, dtypes, shapes and token counts. A provider that refuses says why; a wrong one is not passed."""
    found = []
    for shape in shapes:
        for dtype, tolerance in TOLERANCES.items():
            for n_tokens in tokens:
                p = make_problem(shape, n_tokens, dtype, device, seed=n_tokens)
                expected, _ = moe_mlp_reference(MoECall(p.x, p.ids, p.weights, p.table, 0), torch.float64)
                for name, provider in PROVIDERS.items():
                    error, problem = None, None
                    try:
                        error = float((provider(p).double() - expected).norm() / expected.norm())
                    except Exception as failure:  # whatever a peer raises on this machine belongs in the table
                        problem = f"{type(failure).__name__}: {failure}".splitlines()[0]
                    label = str(dtype).removeprefix("torch.")
                    found.append(Verdict(name, shape.name, n_tokens, label, error, tolerance, problem))
    return found
