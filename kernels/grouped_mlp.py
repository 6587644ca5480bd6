"""Expert MLPs on grouped tokens, for prefill and larger batches: each expert's weights are read once for all its tokens.

Four launches, sizes on the device only, no atomics:
1. `pair_groups`: pairs sorted by expert, cut into tiles of one expert;
2. gate-up: y[position] = gated(x[token] @ gate_up^T + bias), tokens gathered on load, y in sorted order. Gate and up rows
   alternate in the weight tile, so that one `tl.dot` computes both and a thread holds both halves of what it gates;
3. down: rows[pair] = y[position] @ down^T + bias, scattered on store;
4. combine: out[t] = sum_j weights[t, j] * rows[t, j] (+ shared) (+ residual), in fp32, in one order.

Bytes: 3 * H * I weights for each expert touched and, of an expert with more tokens than a tile, again from L2 for each further
tile; pairs * (2 H + 2 I) activations. FLOPs: 6 * H * I per pair; rows that only fill a tile up cost time on tensor cores that
wait for memory anyway below about 180 tokens an expert (790 TFLOP/s over 4.3 TB/s).

Experts of a `QuantisedTable` are read as codes and dequantised in registers: bits / 16 of those weights, and a conversion a weight and tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codes_in_registers import KINDS, multiply_codes
from kernels.compile_case import CompileCase, Expectations, meta_outputs, model_calls, quantised_calls
from kernels.gated_activation import gated_activation
from kernels.grouped_tiles import GroupedTiles, grouped_tiles, quantised_tiles
from kernels.launch import Launch, check_launchable
from kernels.moe_call import MoECall
from kernels.pair_groups import PairGroups, group_launch
from kernels.quantised_experts import QuantisedTable
from kernels.slot_table import expert_rows

COMBINE_COLUMNS = 256  # 16-byte loads of one warp: warps take turns on the ranks, and a thread has few loads to wait for
TILES_IN_A_ROW = 8  # tiles that take turns on one block of weights while it is in L2

Arguments = dict[str, Tensor | int | float | bool | None]  # of a launch, by name


def grouped_mlp(call: MoECall, out: Tensor | None = None, missed: Tensor | None = None) -> Tensor:
    """The expert part of one MoE layer for many tokens.

    Args:
        call: what to compute; its experts may be quantised.
        out: [T, H] for the result, like `call.x`; by default new memory.
        missed: int32 [1], set to 1 where a token needs an absent expert, else left alone. By default nobody is told.

    Returns:
        `out`; `moe_mlp_reference` is the reference.

    Raises:
        KernelInputError: `out` or `missed` do not fit, or this machine cannot run the kernels; nothing has been launched then.
    """
    out = torch.empty_like(call.x) if out is None else out
    missed = call.ids.new_zeros(1, dtype=torch.int32) if missed is None else missed
    launches = grouped_launches(call, out, missed)
    check_launchable(call.x.device)
    for launch in launches:
        launch.run()
    return out


def grouped_launches(call: MoECall, out: Tensor, missed: Tensor) -> tuple[Launch, Launch, Launch, Launch]:
    """All launches, checked and not yet run."""
    call.check_outputs(out, missed)
    rows = empty_rows(call)
    return *rows_launches(call, rows, missed), combine_launch(call, rows, out, missed)


def empty_rows(call: MoECall) -> Tensor:
    """Unwritten memory for what `combine_launch` sums: [T * k, H], a row for each pair."""
    return call.x.new_empty(call.n_pairs, call.table.geometry.hidden)


def rows_launches(call: MoECall, rows: Tensor, missed: Tensor) -> tuple[Launch, Launch, Launch]:
    """Write the rows of `rows` [T * k, H] whose pairs have a known id, zeros where its expert is absent; leave the others alone."""
    size, table = call.table.geometry, call.table
    tiles, gate_up_codes, down_codes = _reading(call)
    groups = PairGroups.empty(call.ids, table.n_experts, tiles.rows)
    y = call.x.new_empty(call.n_pairs, size.intermediate)
    common: Arguments = {
        "order_ptr": groups.order,
        "tiles_ptr": groups.tiles,
        "n_tiles_ptr": groups.n_tiles,
        "max_tiles": groups.max_tiles,
        "HIDDEN": size.hidden,
        "INNER": size.intermediate,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "IN_A_ROW": TILES_IN_A_ROW,
    }
    gate_up = Launch(
        _gate_up_kernel,
        (groups.max_tiles * triton.cdiv(2 * size.intermediate, tiles.columns),),
        {
            **common,
            **gate_up_codes,
            **call.activation.constants,
            "x_ptr": call.x,
            "bias_ptr": call.gate_up_bias,
            "y_ptr": y,
            "missed_ptr": missed,
            "top_k": call.top_k,
            "width": size.hidden,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    down = Launch(
        _down_kernel,
        (groups.max_tiles * triton.cdiv(size.hidden, tiles.columns),),
        {
            **common,
            **down_codes,
            "y_ptr": y,
            "bias_ptr": call.down_bias,
            "rows_ptr": rows,
            "width": size.intermediate,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return group_launch(call.ids, table.n_experts, groups), gate_up, down


def _reading(call: MoECall) -> tuple[GroupedTiles, Arguments, Arguments]:
    """Block sizes, and what gate-up's and down's kernel must know to find and read the experts' weights."""
    table, size = call.table, call.table.geometry
    if not isinstance(table, QuantisedTable):
        found: Arguments = {**table.arguments(call.layer), "KIND": None, "GROUP": None, "SCALES_OFFSET": None}
        tiles = grouped_tiles(call.n_pairs, table.n_experts, size.dtype)
        return tiles, found, {**found, "DOWN_OFFSET": size.down_offset // size.dtype.itemsize}
    coded = table.geometry
    tiles = quantised_tiles(call.n_pairs, table.n_experts, size.dtype, coded.how)
    found = {
        **table.quantised_arguments(call.layer),
        "KIND": KINDS[coded.how.kind],
        "GROUP": coded.how.group or tiles.depth,
        "SCALES_OFFSET": coded.gate_up_scales_offset,
    }
    return tiles, found, {**found, "DOWN_OFFSET": coded.down_offset, "SCALES_OFFSET": coded.down_scales_offset}


def combine_launch(call: MoECall, rows: Tensor, out: Tensor, missed: Tensor) -> Launch:
    """The weighted sum of `rows` [T * k, H] over each token's pairs, into `out` [T, H]."""
    return Launch(
        _combine_kernel,
        (call.n_tokens, triton.cdiv(call.table.geometry.hidden, COMBINE_COLUMNS)),
        {
            "rows_ptr": rows,
            "ids_ptr": call.ids,
            "weights_ptr": call.weights,
            "shared_ptr": call.shared,
            "residual_ptr": call.residual,
            "out_ptr": out,
            "missed_ptr": missed,
            "n_experts": call.table.n_experts,
            "top_k": call.top_k,
            "HIDDEN": call.table.geometry.hidden,
            "RANKS": triton.next_power_of_2(call.top_k),
            "COLUMNS": COMBINE_COLUMNS,
        },
    )


def compile_cases() -> list[CompileCase]:
    """For the ahead-of-time compiler: all four launches at real models' sizes."""
    cases = []
    for name, call in [*model_calls(tokens=(8, 64, 512)), *quantised_calls(tokens=(8, 512, 2048))]:
        exact = call.x.dtype == torch.float32  # NVIDIA's tensor cores would round fp32 to tf32: "ieee" keeps off them
        multiply = Expectations(max_registers=255, wide_loads=not exact, tensor_cores=not exact)
        expected = (Expectations(), multiply, multiply, Expectations())
        launches = grouped_launches(call, *meta_outputs(call))
        cases += [CompileCase(name, launch, expect) for launch, expect in zip(launches, expected, strict=True)]
    return cases


@triton.jit
def _place(max_tiles, n_blocks, IN_A_ROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """(tile, block of columns) of this program: IN_A_ROW tiles, often of one expert, share a block of weights in L2."""
    program = tl.program_id(0)
    first = program // (IN_A_ROW * n_blocks) * IN_A_ROW
    height = tl.minimum(max_tiles - first, IN_A_ROW)
    within = program % (IN_A_ROW * n_blocks)
    return first + within % height, within // height


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    a_ptrs, b_ptrs, n_columns, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    """a [ROWS, n_columns] @ b [n_columns, COLUMNS] in fp32; `n_columns` is WIDTH, or 0 where the expert is absent.

    The bound comes in at run time: LLVM unrolls short loops whose length it knows, prologue and all, and then registers spill.
    """
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n_columns, DEPTH):
        if WIDTH % DEPTH == 0:
            a = tl.load(a_ptrs + first)
            b = tl.load(b_ptrs + first)
        else:
            inside = first + depth < WIDTH
            a = tl.load(a_ptrs + first, mask=inside[None, :], other=0)
            b = tl.load(b_ptrs + first, mask=inside[:, None], other=0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["max_tiles"])  # it changes with every prompt: no new compilation for that
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x_ptr, order_ptr, tiles_ptr, n_tiles_ptr, entries_ptr, pool_ptr, bias_ptr, y_ptr, missed_ptr,
    max_tiles, row_stride, n_slots, n_experts, top_k, width,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, BY_ADDRESS: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, SCALES_OFFSET: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_SHIFT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, IN_A_ROW: tl.constexpr,
):  # fmt: skip
    """y for one tile of pairs and COLUMNS // 2 columns."""
    tile, block = _place(max_tiles, tl.cdiv(2 * INNER, COLUMNS), IN_A_ROW)
    if tile >= tl.load(n_tiles_ptr):
        return
    expert = tl.load(tiles_ptr + tile * 3)
    position = tl.load(tiles_ptr + tile * 3 + 1) + tl.arange(0, ROWS)
    inside = position < tl.load(tiles_ptr + tile * 3 + 2)
    weights, there = expert_rows(entries_ptr, pool_ptr, row_stride, n_slots, n_experts, expert, BY_ADDRESS)
    if there == 0:
        tl.store(missed_ptr, 1)

    token = (tl.load(order_ptr + position, mask=inside, other=0) // top_k).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    half = tl.arange(0, COLUMNS)
    # Columns gate 0, up 0, gate 1, up 1, ...; the last block wraps around instead of masking, its surplus is not stored.
    weight_row = (block * (COLUMNS // 2) + half // 2) % INNER + half % 2 * INNER
    x_ptrs = x_ptr + token[:, None] * HIDDEN + depth[None, :]
    n_columns = tl.where(there, width, 0)
    if KIND is None:
        weight_ptrs = weights + weight_row[None, :] * HIDDEN + depth[:, None]
        total = _multiply(x_ptrs, weight_ptrs, n_columns, HIDDEN, ROWS, COLUMNS, DEPTH)
    else:
        codes_ptr = tl.multiple_of(weights.to(tl.pointer_type(tl.uint8)), 16)
        total = multiply_codes(
            x_ptrs, codes_ptr, codes_ptr + SCALES_OFFSET, weight_row, n_columns, HIDDEN, KIND, GROUP, ROWS, COLUMNS, DEPTH
        )
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * (2 * INNER) + weight_row)
        total += tl.where(there, bias.to(tl.float32), 0.0)[None, :]
    gate, up = tl.split(tl.reshape(total, [ROWS, COLUMNS // 2, 2]))
    y = gated_activation(gate, up, ALPHA, LIMIT, UP_SHIFT)
    column = block * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    y_ptrs = y_ptr + position.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (column < INNER)[None, :])


@triton.jit(do_not_specialize=["max_tiles"])
def _down_kernel(  # type: ignore[no-untyped-def]
    y_ptr, order_ptr, tiles_ptr, n_tiles_ptr, entries_ptr, pool_ptr, bias_ptr, rows_ptr,
    max_tiles, row_stride, n_slots, n_experts, width,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, BY_ADDRESS: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, SCALES_OFFSET: tl.constexpr, DOWN_OFFSET: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, IN_A_ROW: tl.constexpr,
):  # fmt: skip
    """rows for one tile of pairs and COLUMNS columns; zeros where the expert is absent."""
    tile, block = _place(max_tiles, tl.cdiv(HIDDEN, COLUMNS), IN_A_ROW)
    if tile >= tl.load(n_tiles_ptr):
        return
    expert = tl.load(tiles_ptr + tile * 3)
    start = tl.load(tiles_ptr + tile * 3 + 1)
    end = tl.load(tiles_ptr + tile * 3 + 2)
    position = start + tl.arange(0, ROWS)
    weights, there = expert_rows(entries_ptr, pool_ptr, row_stride, n_slots, n_experts, expert, BY_ADDRESS)

    depth = tl.arange(0, DEPTH)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    weight_row = column % HIDDEN
    y_ptrs = y_ptr + tl.minimum(position, end - 1).to(tl.int64)[:, None] * INNER + depth[None, :]
    n_columns = tl.where(there, width, 0)
    if KIND is None:
        weight_ptrs = weights + DOWN_OFFSET + weight_row[None, :] * INNER + depth[:, None]
        total = _multiply(y_ptrs, weight_ptrs, n_columns, INNER, ROWS, COLUMNS, DEPTH)
    else:
        codes_ptr = tl.multiple_of(weights.to(tl.pointer_type(tl.uint8)), 16)
        total = multiply_codes(
            y_ptrs, codes_ptr + DOWN_OFFSET, codes_ptr + SCALES_OFFSET, weight_row, n_columns,
            INNER, KIND, GROUP, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * HIDDEN + weight_row)
        total += tl.where(there, bias.to(tl.float32), 0.0)[None, :]
    pair = tl.load(order_ptr + position, mask=position < end, other=0).to(tl.int64)
    row_ptrs = rows_ptr + pair[:, None] * HIDDEN + column[None, :]
    tl.store(row_ptrs, total.to(rows_ptr.dtype.element_ty), mask=(position < end)[:, None] & (column < HIDDEN)[None, :])


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, ids_ptr, weights_ptr, shared_ptr, residual_ptr, out_ptr, missed_ptr,
    n_experts, top_k,
    HIDDEN: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[token, columns]: all rows of the token at once, so that their loads are in flight together. Pairs without a known expert have no row: they are skipped, and ids past the last are missed."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANKS)
    pair = token * top_k + rank
    expert = tl.load(ids_ptr + pair, mask=rank < top_k, other=-1)
    weight = tl.load(weights_ptr + pair, mask=rank < top_k, other=0).to(tl.float32)
    if tl.max(expert, axis=0) >= n_experts:
        tl.store(missed_ptr, 1)
    known = (expert >= 0) & (expert < n_experts)
    inside = known[:, None] & (column < HIDDEN)[None, :]
    rows = tl.load(rows_ptr + pair[:, None] * HIDDEN + column[None, :], mask=inside, other=0).to(tl.float32)
    total = tl.sum(rows * weight[:, None], axis=0)
    offset = token * HIDDEN + column
    if shared_ptr is not None:
        total += tl.load(shared_ptr + offset, mask=column < HIDDEN, other=0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + offset, mask=column < HIDDEN, other=0).to(tl.float32)
    tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask=column < HIDDEN)
