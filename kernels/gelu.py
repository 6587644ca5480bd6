"""The exact GELU, x * Phi(x), for kernels: `torch.nn.functional.gelu` with its default arguments."""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def gelu(x):  # type: ignore[no-untyped-def]
    """Of an fp32 block."""
    return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
