"""What the other kernel tests rest on: the interpreter runs, and its bf16 arithmetic is torch's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.interpreter_bf16 import round_to_bf16, widen


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, sum_ptr, product_ptr, less_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(sum_ptr + at, a + b)
    tl.store(product_ptr + at, a * b)
    tl.store(less_ptr + at, (a < b).to(tl.int32))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + row * SIZE + column), tl.load(b_ptr + row * SIZE + column)
    tl.store(out_ptr + row * SIZE + column, tl.dot(a, b))


def test_every_rounding_to_bf16_is_that_of_torch() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint32)
    for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (patterns << 16 | low).view(np.float32)
        numbers = values[~np.isnan(values)]
        expected = torch.from_numpy(numbers.copy()).bfloat16().view(torch.uint16).numpy()
        assert np.array_equal(round_to_bf16(numbers), expected)
    assert np.isnan(widen(round_to_bf16(np.array([np.nan], np.float32)))).all()


def test_bf16_arithmetic_in_a_kernel_is_that_of_torch() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 256).bfloat16()
    total, product, less = torch.empty_like(a), torch.empty_like(a), torch.empty(256, dtype=torch.int32)
    _arithmetic_kernel[(1,)](a, b, total, product, less, SIZE=256)
    assert torch.equal(total, a + b) and torch.equal(product, a * b) and torch.equal(less.bool(), a < b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dot_sums_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 32).to(dtype)
    out = torch.full((32, 32), torch.nan)
    _dot_kernel[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
