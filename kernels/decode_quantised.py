"""Quantised expert MLPs at decode: `decode_mlp`'s two launches, with weights that become numbers in registers.

1. gate-up: y[pair] = gated(gate_up @ x[token] + bias), one program per pair and block of I;
2. down:    out[t] = sum_j weights[t, j] * (down[ids[t, j]] @ y[t, j] + bias) (+ shared) (+ residual), one program per token and
   block of H, which holds all k experts of the token.

A tile is [rows, parts, groups, units of a group]: parts are gate and up, or the token's experts; a unit is an int32 of 4 or 8 codes, and one code
in fp8, whose rows may begin anywhere. Codes are read in 16-byte loads, once, a tile ahead; each is converted and multiplied with x in fp32; the sum over
a group is scaled. No tensor cores, no shared-memory staging: nothing of the WGMMA with register operands that ptxas is known to break.

Bytes: 3 * H * I * bits / 8 per pair, plus scales. FLOPs: 6 * H * I per pair, and a conversion a weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codes_in_registers import FP8, INT4, INT8, KINDS, e4m3_over_256, group_scales, int8_of_word, nibbles_of_word
from kernels.compile_case import CompileCase, Expectations, meta_outputs, quantised_calls
from kernels.decode_mlp import MAX_PAIRS
from kernels.gated_activation import gated_activation
from kernels.launch import Launch, check_launchable
from kernels.moe_call import MoECall
from kernels.quantised import QuantFormat
from kernels.quantised_experts import QuantisedTable
from kernels.slot_table import expert_rows
from prefetch.errors import KernelInputError

ROW_GROUP_BYTES = 16  # codes of a tile's group where one scale serves the whole row: one load
TILE_BYTES = 8192  # codes in flight: 4 loads of 16 bytes a thread
LONGEST_TILE_BYTES = 512  # of one row: a warp's 32 loads


def decode_quantised(call: MoECall, out: Tensor | None = None, missed: Tensor | None = None) -> Tensor:
    """The expert part of one MoE layer for few tokens, experts in a `QuantisedTable`.

    Args:
        call: what to compute; `x` has the geometry's dtype, that of the activations.
        out: [T, H] for the result, like `call.x`; by default new memory.
        missed: int32 [1], set to 1 where a token needs an absent expert, else left alone. By default nobody is told.

    Returns:
        `out`; `moe_mlp_reference` is the reference, with weights of `kernels.quantised.dequantise`.

    Raises:
        KernelInputError: experts are not quantised, `out` or `missed` do not fit, or this machine cannot run the kernels; nothing has
            been launched then.
    """
    out = torch.empty_like(call.x) if out is None else out
    missed = call.ids.new_zeros(1, dtype=torch.int32) if missed is None else missed
    launches = quantised_launches(call, out, missed)
    check_launchable(call.x.device)
    for launch in launches:
        launch.run()
    return out


def quantised_launches(call: MoECall, out: Tensor, missed: Tensor) -> tuple[Launch, Launch]:
    """Both launches, checked and not yet run."""
    call.check_outputs(out, missed)
    if not isinstance(call.table, QuantisedTable):
        raise KernelInputError("decode_quantised needs experts in a QuantisedTable; use decode_mlp for plain ones")
    if call.n_pairs > MAX_PAIRS:
        raise KernelInputError(f"{call.n_pairs} (token, expert) pairs: the decode kernels take at most {MAX_PAIRS}")
    size = call.table.geometry
    y = call.x.new_empty(call.n_pairs, size.intermediate)
    common = {**call.table.quantised_arguments(call.layer), "ids_ptr": call.ids, "y_ptr": y, "top_k": call.top_k}
    common |= {"HIDDEN": size.hidden, "INNER": size.intermediate, "KIND": KINDS[size.how.kind]}
    n_ranks = triton.next_power_of_2(call.top_k)
    gate_up_tile, gate_up_rows = _tile(size.how, size.hidden, n_parts=2)
    down_tile, down_rows = _tile(size.how, size.intermediate, n_ranks)
    gate_up = Launch(
        _gate_up_kernel,
        (triton.cdiv(size.intermediate, gate_up_rows), call.n_pairs),
        {
            **common,
            **call.activation.constants,
            **gate_up_tile,
            "x_ptr": call.x,
            "bias_ptr": call.gate_up_bias,
            "missed_ptr": missed,
            "SCALES_OFFSET": size.gate_up_scales_offset,
        },
    )
    down = Launch(
        _down_kernel,
        (triton.cdiv(size.hidden, down_rows), call.n_tokens),
        {
            **common,
            **down_tile,
            "weights_ptr": call.weights,
            "bias_ptr": call.down_bias,
            "shared_ptr": call.shared,
            "residual_ptr": call.residual,
            "out_ptr": out,
            "RANKS": n_ranks,
            "CODES_OFFSET": size.down_offset,
            "SCALES_OFFSET": size.down_scales_offset,
        },
    )
    return gate_up, down


def _tile(how: QuantFormat, columns: int, n_parts: int) -> tuple[dict[str, int], int]:
    """The constexprs of a tile over rows of `columns` weights in `n_parts` matrices, and how many rows of each it has."""
    row_bytes = how.codes_shape(1, columns)[1]
    group_bytes = ROW_GROUP_BYTES if how.group is None else how.codes_shape(1, how.group)[1]
    n_groups = min(LONGEST_TILE_BYTES // group_bytes, triton.next_power_of_2(triton.cdiv(row_bytes, group_bytes)))
    rows = max(1, min(16, TILE_BYTES // (n_parts * n_groups * group_bytes)))
    unit = 1 if how.kind == "fp8" else 4
    in_units = {"ROW_UNITS": row_bytes // unit, "UNITS": group_bytes // unit}
    return {**in_units, "row_groups": triton.cdiv(row_bytes, group_bytes), "ROWS": rows, "GROUPS": n_groups}, rows


def compile_cases() -> list[CompileCase]:
    """For the ahead-of-time compiler: every kind of code, with and without biases. Launches for more tokens are the same programs."""
    expect = Expectations(max_registers=200, wide_loads=True, kilobytes_in_flight=4)  # 2 programs a multiprocessor
    return [
        CompileCase(name, launch, expect)
        for name, call in quantised_calls(tokens=(1,))
        for launch in quantised_launches(call, *meta_outputs(call))
    ]


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x_ptr, ids_ptr, entries_ptr, pool_ptr, bias_ptr, y_ptr, missed_ptr,
    row_stride, n_slots, n_experts, top_k, row_groups,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, BY_ADDRESS: tl.constexpr, KIND: tl.constexpr, SCALES_OFFSET: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_SHIFT: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, UNITS: tl.constexpr, ROW_UNITS: tl.constexpr,
):  # fmt: skip
    """y[pair, rows] for one pair and ROWS rows of gate and the same of up, which are the two parts."""
    pair = tl.program_id(1).to(tl.int64)
    token = pair // top_k
    expert = tl.load(ids_ptr + pair)
    weights, there = expert_rows(entries_ptr, pool_ptr, row_stride, n_slots, n_experts, expert, BY_ADDRESS)
    if (expert >= 0) & (there == 0):
        tl.store(missed_ptr, 1)
    codes_ptr = tl.multiple_of(weights.to(tl.pointer_type(tl.uint8)), 16)

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, 2)
    inside = ((row < INNER) & there)[:, None] & (part >= 0)[None, :]
    sums = _row_sums(
        codes_ptr, codes_ptr + SCALES_OFFSET, row[:, None] + part[None, :] * INNER, inside,
        x_ptr + token * HIDDEN + tl.zeros([1], tl.int32), tl.full([1], 1, tl.int1), row_groups,
        KIND, ROWS, 2, GROUPS, UNITS, ROW_UNITS,
    )  # fmt: skip
    gate_sum, up_sum = tl.split(sums)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * (2 * INNER) + row
        row_inside = (row < INNER) & there
        gate_sum += tl.load(bias_ptrs, mask=row_inside, other=0).to(tl.float32)
        up_sum += tl.load(bias_ptrs + INNER, mask=row_inside, other=0).to(tl.float32)
    y = tl.where(there, gated_activation(gate_sum, up_sum, ALPHA, LIMIT, UP_SHIFT), 0.0)
    tl.store(y_ptr + pair * INNER + row, y.to(y_ptr.dtype.element_ty), mask=row < INNER)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    y_ptr, ids_ptr, weights_ptr, entries_ptr, pool_ptr, bias_ptr, shared_ptr, residual_ptr, out_ptr,
    row_stride, n_slots, n_experts, top_k, row_groups,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, BY_ADDRESS: tl.constexpr, KIND: tl.constexpr,
    CODES_OFFSET: tl.constexpr, SCALES_OFFSET: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, UNITS: tl.constexpr, ROW_UNITS: tl.constexpr,
):  # fmt: skip
    """out[token, rows], the sum over the token's experts, which are the parts."""
    token = tl.program_id(1).to(tl.int64)
    rank = tl.arange(0, RANKS)
    pair = token * top_k + rank
    expert = tl.load(ids_ptr + pair, mask=rank < top_k, other=-1)
    experts, there = expert_rows(entries_ptr, pool_ptr, row_stride, n_slots, n_experts, expert, BY_ADDRESS)
    weight = tl.load(weights_ptr + pair, mask=rank < top_k, other=0).to(tl.float32)
    weight = tl.where(there, weight, 0.0)  # not a mask of the load, which would then wait for the table
    codes_ptr = tl.multiple_of(experts.to(tl.pointer_type(tl.uint8)), 16)[None, :]

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < HIDDEN)[:, None] & there[None, :]
    down = _row_sums(
        codes_ptr + CODES_OFFSET, codes_ptr + SCALES_OFFSET, row[:, None], inside,
        y_ptr + pair * INNER, there, row_groups,
        KIND, ROWS, RANKS, GROUPS, UNITS, ROW_UNITS,
    )  # fmt: skip
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert.to(tl.int64)[None, :] * HIDDEN + row[:, None]
        down += tl.load(bias_ptrs, mask=inside, other=0).to(tl.float32)
    out = tl.sum(down * weight[None, :], axis=1)
    offset = token * HIDDEN + row
    if shared_ptr is not None:
        out += tl.load(shared_ptr + offset, mask=row < HIDDEN, other=0).to(tl.float32)
    if residual_ptr is not None:
        out += tl.load(residual_ptr + offset, mask=row < HIDDEN, other=0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=row < HIDDEN)


@triton.jit
def _row_sums(  # type: ignore[no-untyped-def]
    codes_ptr, scales_ptr, row, inside, inputs_ptr, inputs_there, row_groups,
    KIND: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    GROUPS: tl.constexpr, UNITS: tl.constexpr, ROW_UNITS: tl.constexpr,
):  # fmt: skip
    """Rows of weights times inputs, fp32 [ROWS, PARTS]: of the matrix at `codes_ptr`, row number `row` (both broadcast to that shape).

    `inputs_ptr` and `inputs_there` are [PARTS], or [1] where all parts have the same inputs. `row_groups` comes at run time, since LLVM unrolls
    a loop whose length it knows. The next tile's codes and scales are on their way while this one's are multiplied.
    """
    if KIND != FP8:
        codes_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
    unit = tl.arange(0, GROUPS)[:, None] * UNITS + tl.arange(0, UNITS)[None, :]
    code_ptrs = (codes_ptr + row * ROW_UNITS)[:, :, None, None] + unit[None, None, :, :]
    codes_ahead = _codes(code_ptrs, inside, 0, GROUPS, UNITS, ROW_UNITS)
    scales_ahead = _scales(scales_ptr, row, inside, 0, KIND, ROWS, PARTS, GROUPS, ROW_UNITS // UNITS)
    sums = tl.zeros([ROWS, PARTS, GROUPS], tl.float32)
    for first in range(0, row_groups, GROUPS):
        codes, scales = codes_ahead, scales_ahead
        codes_ahead = _codes(code_ptrs, inside, first + GROUPS, GROUPS, UNITS, ROW_UNITS)
        scales_ahead = _scales(scales_ptr, row, inside, first + GROUPS, KIND, ROWS, PARTS, GROUPS, ROW_UNITS // UNITS)
        sums += scales * _group_sums(codes, inputs_ptr, inputs_there, first, KIND, GROUPS, UNITS, ROW_UNITS)
    total = tl.sum(sums, axis=2)
    if KIND == FP8:
        total *= tl.load(scales_ptr.to(tl.pointer_type(tl.float32)) + row, mask=inside, other=0)
    return total


@triton.jit
def _inside_row(first, GROUPS: tl.constexpr, UNITS: tl.constexpr, ROW_UNITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which units, [GROUPS, UNITS], of the groups from number `first` on a row has; [GROUPS, 1] where it has whole groups."""
    group = first + tl.arange(0, GROUPS)[:, None]
    return group < ROW_UNITS // UNITS if ROW_UNITS % UNITS == 0 else group * UNITS + tl.arange(0, UNITS)[None, :] < ROW_UNITS


@triton.jit
def _codes(code_ptrs, inside, first, GROUPS: tl.constexpr, UNITS: tl.constexpr, ROW_UNITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes [ROWS, PARTS, GROUPS, UNITS] from group `first` of each row on."""
    tile_inside = inside[:, :, None, None] & _inside_row(first, GROUPS, UNITS, ROW_UNITS)[None, None, :, :]
    return tl.load(code_ptrs + first * UNITS, mask=tile_inside, other=0, eviction_policy="evict_first")


@triton.jit
def _scales(  # type: ignore[no-untyped-def]
    scales_ptr, row, inside, first,
    KIND: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, GROUPS: tl.constexpr, ROW_GROUPS: tl.constexpr,
):  # fmt: skip
    """The scales, fp32 [ROWS, PARTS, GROUPS], of groups from number `first` on; ones where a row has one scale."""
    if KIND == FP8:
        return tl.full([ROWS, PARTS, GROUPS], 1.0, tl.float32)
    else:
        group = first + tl.arange(0, GROUPS)
        scale_inside = inside[:, :, None] & (group < ROW_GROUPS)[None, None, :]
        rows_ptr = tl.broadcast_to(scales_ptr, [ROWS, PARTS])[:, :, None]
        return group_scales(rows_ptr, (row * ROW_GROUPS)[:, :, None] + group[None, None, :], scale_inside, KIND)


@triton.jit
def _group_sums(  # type: ignore[no-untyped-def]
    codes, inputs_ptr, there, first, KIND: tl.constexpr, GROUPS: tl.constexpr, UNITS: tl.constexpr, ROW_UNITS: tl.constexpr
):
    """Weights times inputs, summed by group, fp32 [ROWS, PARTS, GROUPS], not yet scaled; `first` is the group that the codes begin with.

    A thread holds 16 neighbouring bytes: the sum over a group is its own work, or that of 2 or 4 threads.
    """
    inside = there[:, None, None] & _inside_row(first, GROUPS, UNITS, ROW_UNITS)[None, :, :]
    if KIND == FP8:
        x = _inputs(inputs_ptr + first * UNITS, inside, UNITS, 1, GROUPS, UNITS)
        return tl.sum(e4m3_over_256(codes) * x, axis=3) * 2.0**8
    elif KIND == INT8:
        products, _ = _products(codes, inputs_ptr + first * (4 * UNITS), inside, KIND, 0, 4 * UNITS, GROUPS, UNITS)
        return products
    else:
        group_ptr = inputs_ptr + first * (8 * UNITS)
        low, x_low = _products(codes, group_ptr, inside, KIND, 0, 8 * UNITS, GROUPS, UNITS)
        high, x_high = _products(codes, group_ptr + 4 * UNITS, inside, KIND, 4, 8 * UNITS, GROUPS, UNITS)
        if KIND == INT4:
            return (low + high) * 2.0**24 - 8.0 * (x_low + x_high)
        else:
            return (low + high) * 2.0**14


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    words,
    inputs_ptr,
    inside,
    KIND: tl.constexpr,
    BIT: tl.constexpr,
    STEP: tl.constexpr,
    GROUPS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The four numbers of each int32 that begin at bit `BIT` of its bytes, times their inputs, summed by group; and the inputs' sum."""
    first_x = _inputs(inputs_ptr, inside, STEP, 4, GROUPS, UNITS)
    second_x = _inputs(inputs_ptr + 1, inside, STEP, 4, GROUPS, UNITS)
    third_x = _inputs(inputs_ptr + 2, inside, STEP, 4, GROUPS, UNITS)
    fourth_x = _inputs(inputs_ptr + 3, inside, STEP, 4, GROUPS, UNITS)
    if KIND == INT8:
        one, two, three, four = int8_of_word(words, 0), int8_of_word(words, 1), int8_of_word(words, 2), int8_of_word(words, 3)
    else:
        one, three = nibbles_of_word(words, BIT, KIND)
        two, four = nibbles_of_word(words, BIT + 8, KIND)
    products = one * first_x + two * second_x + three * third_x + four * fourth_x
    return tl.sum(products, axis=3), tl.sum(first_x + second_x + third_x + fourth_x, axis=3)


@triton.jit
def _inputs(  # type: ignore[no-untyped-def]
    inputs_ptr, inside, STEP: tl.constexpr, EVERY: tl.constexpr, GROUPS: tl.constexpr, UNITS: tl.constexpr
):
    """fp32 [1, PARTS, GROUPS, UNITS] from `inputs_ptr` [PARTS] on: every STEP of them, UNITS that are EVERY apart."""
    column = tl.arange(0, GROUPS)[:, None] * STEP + tl.arange(0, UNITS)[None, :] * EVERY
    x = tl.load(inputs_ptr[:, None, None] + column[None, :, :], mask=inside, other=0)
    return x.to(tl.float32)[None, :, :, :]
