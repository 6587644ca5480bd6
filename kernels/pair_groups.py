"""Group the (token, expert) pairs of a layer call by expert, on the device: histogram, scan, stable counting sort, tiles.

One program per expert, one launch, no atomics and no program waiting for another: each counts all pairs itself (16 KB of ids
at 512 tokens of top-8, from L2), so it knows where its own pairs begin, and writes them in pair order.

Bytes: E * T * k * 4, from L2. The result has one order: two runs group alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch

PAIRS_AT_ONCE = 512


@dataclass(frozen=True)
class PairGroups:
    """Pairs sorted by expert, cut into tiles of at most `tile_rows` pairs of one expert."""

    order: Tensor  # int32 [n_pairs], pair at each sorted position; pairs without a known expert are left out
    tiles: Tensor  # int32 [max_tiles, 3], (expert, first position, end position); the first n_tiles rows are written
    n_tiles: Tensor  # int32 [1]
    tile_rows: int

    @classmethod
    def empty(cls, ids: Tensor, n_experts: int, tile_rows: int) -> PairGroups:
        """Unwritten memory for the groups of `ids` [T, k] over `n_experts`, enough in the worst case."""
        n_pairs = ids.numel()
        n_touched = min(n_pairs, n_experts)
        max_tiles = min(n_pairs, (n_pairs + n_touched * (tile_rows - 1)) // tile_rows)
        like = ids.new_empty(0).int()
        return cls(like.new_empty(n_pairs), like.new_empty(max_tiles, 3), like.new_empty(1), tile_rows)

    @property
    def max_tiles(self) -> int:
        return int(self.tiles.shape[0])


def group_pairs_reference(ids: Tensor, n_experts: int, tile_rows: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    """The order and the tiles, as Python lists."""
    flat = ids.flatten().tolist()
    order: list[int] = []
    tiles: list[tuple[int, int, int]] = []
    for expert in range(n_experts):
        first = len(order)
        order += [pair for pair, wanted in enumerate(flat) if wanted == expert]
        tiles += [(expert, start, min(start + tile_rows, len(order))) for start in range(first, len(order), tile_rows)]
    return order, tiles


def group_launch(ids: Tensor, n_experts: int, groups: PairGroups) -> Launch:
    """The launch that fills `groups`; `ids` is int32 or int64 [T, k], contiguous."""
    return Launch(
        _group_kernel,
        (n_experts,),
        {
            "ids_ptr": ids,
            "order_ptr": groups.order,
            "tiles_ptr": groups.tiles,
            "n_tiles_ptr": groups.n_tiles,
            "n_pairs": ids.numel(),
            "n_experts": n_experts,
            "TILE_ROWS": groups.tile_rows,
            "EXPERTS": max(16, triton.next_power_of_2(n_experts)),
            "PAIRS": PAIRS_AT_ONCE,
        },
    )


@triton.jit(do_not_specialize=["n_pairs"])  # it changes with every prompt: no new compilation for that
def _group_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, order_ptr, tiles_ptr, n_tiles_ptr, n_pairs, n_experts,
    TILE_ROWS: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The share of one expert: its pairs in `order`, its rows of `tiles`."""
    expert = tl.program_id(0)
    lane = tl.arange(0, PAIRS)
    counts = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, n_pairs, PAIRS):
        wanted = tl.load(ids_ptr + first + lane, mask=first + lane < n_pairs, other=-1)
        known = (wanted >= 0) & (wanted < n_experts)
        counts += tl.histogram(tl.where(known, wanted, 0).to(tl.int32), EXPERTS, mask=known)
    each = tl.arange(0, EXPERTS)
    tiles_each = (counts + TILE_ROWS - 1) // TILE_ROWS
    start = tl.sum(tl.where(each < expert, counts, 0))
    count = tl.sum(tl.where(each == expert, counts, 0))
    first_tile = tl.sum(tl.where(each < expert, tiles_each, 0))
    n_own_tiles = (count + TILE_ROWS - 1) // TILE_ROWS
    if expert == n_experts - 1:
        tl.store(n_tiles_ptr, first_tile + n_own_tiles)

    position = start
    for first in range(0, n_pairs, PAIRS):
        mine = (tl.load(ids_ptr + first + lane, mask=first + lane < n_pairs, other=-1) == expert).to(tl.int32)
        tl.store(order_ptr + position + tl.cumsum(mine) - 1, first + lane, mask=mine != 0)
        position += tl.sum(mine)
    for first in range(0, n_own_tiles, PAIRS):
        tile = first + lane
        row_start = start + tile * TILE_ROWS
        row = tiles_ptr + (first_tile + tile) * 3
        tl.store(row, expert, mask=tile < n_own_tiles)
        tl.store(row + 1, row_start, mask=tile < n_own_tiles)
        tl.store(row + 2, tl.minimum(row_start + TILE_ROWS, start + count), mask=tile < n_own_tiles)
