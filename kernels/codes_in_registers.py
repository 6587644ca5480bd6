"""Codes of quantised weights become numbers in registers: one by one for dot products, a tile at a time for tensor cores.

`kernels.quantised` has the formats. No part needs to know e4m3 or e2m1: their bits are placed in fp16, which reads them a power of two
too small, subnormals too.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT8, INT4, FP8, MXFP4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
KINDS = {"int8": INT8.value, "int4": INT4.value, "fp8": FP8.value, "mxfp4": MXFP4.value}


@triton.jit
def nibble(code, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fp32 number that a uint8 code below 16 stands for, not yet scaled."""
    if KIND == INT4:
        return ((code ^ 8).to(tl.int32) - 8).to(tl.float32)
    else:
        bits = code.to(tl.int16)
        return (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def e4m3(code):  # type: ignore[no-untyped-def]
    """The fp32 number that a uint8 code stands for, not yet scaled."""
    return e4m3_over_256(code) * 256.0


@triton.jit
def e4m3_over_256(code):  # type: ignore[no-untyped-def]
    """The same, a power of two too small: a factor that a sum takes once."""
    bits = code.to(tl.int16)
    return (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def int8_of_word(words, BYTE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fp32 number of byte `BYTE` of each int32."""
    return ((words << (24 - 8 * BYTE)) >> 24).to(tl.float32)


@triton.jit
def nibbles_of_word(words, BIT: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nibbles from bits `BIT` and `BIT` + 16 of each int32 on, in fp32: number / 2^14 in mxfp4, (8 + number) / 2^24 in int4.

    Both become fp16 at once, which holds an int4 with its sign turned as a subnormal. Who multiplies many of those and sums them subtracts
    8 / 2^24 times the sum of the other factors once.
    """
    if KIND == INT4:
        halves = ((words >> BIT) & 0xF000F) ^ 0x80008
    else:
        placed = words << (9 - BIT) if BIT <= 9 else words >> (BIT - 9)
        halves = (placed & 0xE000E00) | ((words << (12 - BIT)) & -0x7FFF8000)
    low = halves.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, (halves >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def group_scales(scales_ptr, at, inside, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fp32 scales of groups number `at`, a block of any shape; 0 or the smallest where not `inside`."""
    if KIND == MXFP4:
        exponents = tl.load(scales_ptr + at, mask=inside, other=0).to(tl.int32)
        return tl.where(exponents == 0, 0x400000, exponents << 23).to(tl.float32, bitcast=True)
    else:
        return tl.load(scales_ptr.to(tl.pointer_type(tl.float16)) + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def multiply_codes(  # type: ignore[no-untyped-def]
    a_ptrs, codes_ptr, scales_ptr, row, n_columns,
    WIDTH: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """a [ROWS, n_columns] @ weights[row]^T [n_columns, COLUMNS] in fp32; `n_columns` is WIDTH, or 0 where the expert is absent.

    Weights are rounded once to a's dtype, after scaling, but for fp8: its codes are exact there, and the row's scale comes after the sum.
    They are the second operand, which WGMMA reads from shared memory alone: not the one in registers that ptxas is known to break.
    """
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n_columns, DEPTH):
        if WIDTH % DEPTH == 0:
            a = tl.load(a_ptrs + first)
        else:
            a = tl.load(a_ptrs + first, mask=(first + depth < WIDTH)[None, :], other=0)
        b = _numbers(codes_ptr, scales_ptr, row, first, WIDTH, KIND, GROUP, COLUMNS, DEPTH).to(a.dtype)
        total = tl.dot(a, b, total, input_precision="ieee")
    if KIND == FP8:
        there = (row >= 0) & (n_columns > 0)  # an absent expert has no scales to read
        total *= tl.load(scales_ptr.to(tl.pointer_type(tl.float32)) + row, mask=there, other=0)[None, :]
    return total


@triton.jit
def _numbers(  # type: ignore[no-untyped-def]
    codes_ptr, scales_ptr, row, first,
    WIDTH: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """fp32 [DEPTH, COLUMNS]: columns `first`.. of the weights of each `row` [COLUMNS]; fp8 not yet scaled.

    Codes are read as [groups, bytes of a group, COLUMNS]. Low nibbles are a group's first half and high ones its second: joined in front
    of the bytes, they are in the order of the inputs, and no thread has had to ask another.
    """
    PER_BYTE: tl.constexpr = 2 if (KIND == INT4) | (KIND == MXFP4) else 1
    BYTES: tl.constexpr = GROUP // PER_BYTE
    groups = first // GROUP + tl.arange(0, DEPTH // GROUP)
    at = groups[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    code_ptrs = codes_ptr + row[None, None, :] * (WIDTH // PER_BYTE) + at[:, :, None]
    inside = (at < WIDTH // PER_BYTE)[:, :, None]
    codes = tl.load(code_ptrs) if WIDTH % DEPTH == 0 else tl.load(code_ptrs, mask=inside, other=0)
    if KIND == FP8:
        numbers = e4m3(codes)
    elif KIND == INT8:
        numbers = codes.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        halves = tl.join(nibble(codes & 15, KIND), nibble(codes >> 4, KIND))
        numbers = tl.reshape(tl.permute(halves, (0, 3, 1, 2)), [DEPTH // GROUP, GROUP, COLUMNS])
    if KIND != FP8:
        N_SCALES: tl.constexpr = WIDTH // GROUP
        scale_at = row[None, :] * N_SCALES + groups[:, None]
        numbers *= group_scales(scales_ptr, scale_at, (groups < N_SCALES)[:, None], KIND)[:, None, :]
    return tl.reshape(numbers, [DEPTH, COLUMNS])
