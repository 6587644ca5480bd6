"""A repeated launch runs what a launch would, and on a GPU by way of the compiled kernel wherever that is the right one."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.launch import Launch
from kernels.repeated_launch import RepeatedLaunch


@triton.jit
def _scale_kernel(x_ptr, out_ptr, factor, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at) * factor)


def test_a_repeated_launch_takes_other_tensors_and_widths() -> None:
    x, out = torch.arange(24.0), torch.full((24,), torch.nan)
    repeated = RepeatedLaunch(Launch(_scale_kernel, (3, 1), {"x_ptr": x, "out_ptr": out, "factor": 0.5, "SIZE": 8}))
    for other in (x + 1, x[1:17].clone()):
        repeated.run(2, {"x_ptr": torch.cat([other, x])})
        assert torch.equal(out[: len(other)], other / 2)


class CompilingKernel:
    """Answers as Triton's kernels do on a GPU; notes who was called with what."""

    arg_names = ("x_ptr", "out_ptr", "factor", "SIZE")

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*, num_warps: int, num_stages: int, **arguments: Any) -> Any:
            self.calls.append(("found out", grid, tuple(arguments[name] for name in self.arg_names)))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: CompilingKernel):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.kernel.calls.append(("compiled", grid, values))


def test_a_repeated_launch_calls_the_compiled_kernel_where_that_fits() -> None:
    kernel, x, out = CompilingKernel(), torch.zeros(24), torch.zeros(24)
    repeated = RepeatedLaunch(Launch(kernel, (3, 1), {"factor": 0.5, "SIZE": 8, "out_ptr": out, "x_ptr": x}))
    given = [torch.zeros(28)[1:25], torch.zeros(24), torch.zeros(24), torch.zeros(28)[1:25]]
    for n_columns, tensor in enumerate(given, start=1):
        repeated.run(n_columns, {"x_ptr": tensor})
    assert [how for how, _, _ in kernel.calls] == ["found out", "found out", "compiled", "found out"]
    for n_columns, (_, grid, values) in enumerate(kernel.calls, start=1):
        assert grid == (3, n_columns, 1) and values[0] is given[n_columns - 1] and values[1] is out and values[2:] == (0.5, 8)
