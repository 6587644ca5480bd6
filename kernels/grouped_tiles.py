"""Block sizes of the grouped expert kernels, from the load and from what the compiler makes of them (`kernels.aot`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from kernels.quantised import QuantFormat


@dataclass(frozen=True)
class GroupedTiles:
    """Block sizes of both matrix multiplications: [rows, depth] tokens times [depth, columns] weights."""

    rows: int
    columns: int  # of down; half gate and half up in the first
    depth: int
    num_warps: int
    num_stages: int


def grouped_tiles(n_pairs: int, n_experts: int, dtype: torch.dtype) -> GroupedTiles:
    """Rows for twice the mean number of pairs an expert has: a larger tile reads no weights twice, and costs little.

    At most 128 x 128, in fp32 64 x 64: there every product is an FMA of one thread, and its registers spill with more.
    """
    exact, largest = dtype == torch.float32, 256 // dtype.itemsize
    rows = min(max(triton.next_power_of_2(2 * n_pairs // n_experts), 16), largest)
    if rows == 16:
        return GroupedTiles(rows, columns=64, depth=256 // dtype.itemsize, num_warps=4, num_stages=4)
    num_warps = 4 if rows < largest or exact else 8  # ptxas of Triton 3.6.0 spilled fp32's tiles over 8 warps
    return GroupedTiles(rows, largest, depth=1024 // rows if exact else 64, num_warps=num_warps, num_stages=3)


def quantised_tiles(n_pairs: int, n_experts: int, dtype: torch.dtype, how: QuantFormat) -> GroupedTiles:
    """The same rows, and a depth of whole groups; in fp32 smaller, since every thread converts what it multiplies.

    Where tiles are small, 64 bytes of codes a column: with fewer, a thread of gfx942 has no 16 bytes to load.
    """
    plain = grouped_tiles(n_pairs, n_experts, dtype)
    if dtype == torch.float32:
        return replace(plain, rows=min(plain.rows, 32), columns=32, depth=how.group or 32, num_warps=4, num_stages=1)
    if how.group == 128:
        return replace(plain, columns=64, depth=128, num_stages=2)
    return replace(plain, depth=512 // how.bits if plain.rows == 16 else 64)
