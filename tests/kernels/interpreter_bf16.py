"""Triton's interpreter keeps bf16 as bit patterns: it multiplies them as integers and truncates where GPUs round.

`repair` replaces three of its methods so that casts, dot, + - * and comparisons of bf16 give the GPU's results (to nearest
even). Sums and other reductions of bf16 stay wrong there: kernels convert to fp32 first, as they should on a GPU anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """Replace the interpreter's bf16 arithmetic; doing it twice changes nothing."""
    if getattr(InterpreterBuilder, "bf16_repaired", False):
        return
    dot, cast, binary = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, _as_fp32(a), _as_fp32(b), d, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(round_to_bf16(source.data), tl.bfloat16)
        return cast(self, _as_fp32(source), target) if target.scalar != source.dtype.scalar else source

    def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, operation)
        result = operation(widen(left.data), widen(right.data))
        if result.dtype == np.float32:
            return TensorHandle(round_to_bf16(result), tl.bfloat16)
        return TensorHandle(result, tl.int1)  # a comparison

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op = create_dot, cast_impl, binary_op
    InterpreterBuilder.bf16_repaired = True


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns uint16 -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bit patterns uint16, to nearest even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _as_fp32(handle: Any) -> Any:
    return TensorHandle(widen(handle.data), tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle
