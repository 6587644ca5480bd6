"""A kernel that needs more registers than there are; run as a program, prints what the compile check says of it."""

import torch
import triton
import triton.language as tl

from kernels.compile_case import CompileCase
from kernels.launch import Launch
from kernels.machine_code import PARTS, compile_case, violations


@triton.jit
def spilling_kernel(x_ptr, n_rounds, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each round needs all values of the round before: 256 a thread."""
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    for _ in range(n_rounds):
        x = x * tl.sum(x) + tl.max(x)
    tl.store(x_ptr + at, x)


if __name__ == "__main__":
    arguments = {"x_ptr": torch.empty(1 << 15, device="meta"), "n_rounds": 5, "SIZE": 1 << 15}
    case = CompileCase("256 values a thread", Launch(spilling_kernel, (1,), arguments))
    print(*violations(compile_case(case, PARTS["sm_90"]), case.expect), sep="\n")
