"""Quantised expert MLPs at decode: `decode_mlp`'s two launches, with weights that become numbers in registers.

1. gate-up: y[pair] = gated(gate_up @ x[token] + bias), one program per pair and block of I;
2. down:    out[t] = sum_j weights[t, j] * (down[ids[t, j]] @ y[t, j] + bias) (+ shared) (+ residual), one program per token and
   block of H; the token's k experts follow each other unrolled, so that their loads can be in flight together.

A tile is [rows, groups, bytes of a group]. Codes are read in 16-byte loads, once; each is converted and multiplied with x in fp32; the
sum over a group is scaled. No tensor cores, no shared-memory staging: nothing of the WGMMA with register operands that ptxas is known to break.

Bytes: 3 * H * I * bits / 8 per pair, plus scales. FLOPs: 6 * H * I per pair, and a conversion a weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codes_in_registers import FP8, INT4, INT8, KINDS, MXFP4, e4m3, group_scales, nibble
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
TILE_BYTES = 8192  # codes of each matrix in flight: 4 loads of 16 bytes a thread
LONGEST_TILE_BYTES = 1024  # of one row: long tiles share each piece of x among several rows


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
    common = {**call.table.quantised_arguments(call.layer), "ids_ptr": call.ids, "y_ptr": y}
    common |= {"HIDDEN": size.hidden, "INNER": size.intermediate, "KIND": KINDS[size.how.kind]}
    gate_up_tile, gate_up_rows = _tile(size.how, size.hidden)
    down_tile, down_rows = _tile(size.how, size.intermediate)
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
            "top_k": call.top_k,
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
            "TOP_K": call.top_k,
            "CODES_OFFSET": size.down_offset,
            "SCALES_OFFSET": size.down_scales_offset,
        },
    )
    return gate_up, down


def _tile(how: QuantFormat, columns: int) -> tuple[dict[str, int], int]:
    """The constexprs of a tile over rows of `columns` weights, and how many rows it has."""
    row_bytes = how.codes_shape(1, columns)[1]
    group_bytes = ROW_GROUP_BYTES if how.group is None else how.codes_shape(1, how.group)[1]
    n_groups = min(LONGEST_TILE_BYTES // group_bytes, triton.next_power_of_2(triton.cdiv(row_bytes, group_bytes)))
    rows = min(16, TILE_BYTES // (n_groups * group_bytes))
    shape = {"ROWS": rows, "GROUPS": n_groups, "BYTES": group_bytes}
    return {"row_bytes": row_bytes, "N_SCALES": how.scales_shape(1, columns)[1], **shape}, rows


def compile_cases() -> list[CompileCase]:
    """For the ahead-of-time compiler: every kind of code, with and without biases. Launches for more tokens are the same programs."""
    expect = Expectations(max_registers=176, wide_loads=True)  # 2 programs a multiprocessor then have 32 KB in flight
    return [
        CompileCase(name, launch, expect)
        for name, call in quantised_calls(tokens=(1,))
        for launch in quantised_launches(call, *meta_outputs(call))
    ]


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x_ptr, ids_ptr, entries_ptr, pool_ptr, bias_ptr, y_ptr, missed_ptr,
    row_stride, n_slots, n_experts, top_k, row_bytes,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, BY_ADDRESS: tl.constexpr, KIND: tl.constexpr, SCALES_OFFSET: tl.constexpr,
    N_SCALES: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_SHIFT: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """y[pair, rows] for one pair and ROWS rows of gate and the same of up."""
    pair = tl.program_id(1).to(tl.int64)
    token = pair // top_k
    expert = tl.load(ids_ptr + pair)
    weights, there = expert_rows(entries_ptr, pool_ptr, row_stride, n_slots, n_experts, expert, BY_ADDRESS)
    if (expert >= 0) & (there == 0):
        tl.store(missed_ptr, 1)
    codes_ptr = tl.multiple_of(weights.to(tl.pointer_type(tl.uint8)), 16)
    scales_ptr = codes_ptr + SCALES_OFFSET

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = (row < INNER) & there
    gate = tl.zeros([ROWS, GROUPS], tl.float32)
    up = tl.zeros([ROWS, GROUPS], tl.float32)
    for first in range(0, row_bytes, GROUPS * BYTES):
        low, high = _inputs(x_ptr + token * HIDDEN, first, row_bytes, KIND, GROUPS, BYTES)
        gate += _group_sums(codes_ptr, scales_ptr, row, row_inside, first, low, high, row_bytes, KIND, N_SCALES, GROUPS, BYTES)
        up += _group_sums(
            codes_ptr, scales_ptr, INNER + row, row_inside, first, low, high, row_bytes, KIND, N_SCALES, GROUPS, BYTES
        )
    gate_sum = _row_sums(gate, scales_ptr, row, row_inside, KIND)
    up_sum = _row_sums(up, scales_ptr, INNER + row, row_inside, KIND)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * (2 * INNER) + row
        gate_sum += tl.load(bias_ptrs, mask=row_inside, other=0).to(tl.float32)
        up_sum += tl.load(bias_ptrs + INNER, mask=row_inside, other=0).to(tl.float32)
    y = tl.where(there, gated_activation(gate_sum, up_sum, ALPHA, LIMIT, UP_SHIFT), 0.0)
    tl.store(y_ptr + pair * INNER + row, y.to(y_ptr.dtype.element_ty), mask=row < INNER)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    y_ptr, ids_ptr, weights_ptr, entries_ptr, pool_ptr, bias_ptr, shared_ptr, residual_ptr, out_ptr,
    row_stride, n_slots, n_experts, row_bytes,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, BY_ADDRESS: tl.constexpr, KIND: tl.constexpr, TOP_K: tl.constexpr,
    CODES_OFFSET: tl.constexpr, SCALES_OFFSET: tl.constexpr, N_SCALES: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """out[token, rows], the sum over the token's experts in routing order."""
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out = tl.zeros([ROWS], tl.float32)
    for rank in tl.static_range(TOP_K):
        pair = token * TOP_K + rank
        expert = tl.load(ids_ptr + pair)
        weights, there = expert_rows(entries_ptr, pool_ptr, row_stride, n_slots, n_experts, expert, BY_ADDRESS)
        codes_ptr = tl.multiple_of(weights.to(tl.pointer_type(tl.uint8)), 16)
        row_inside = (row < HIDDEN) & there
        groups = tl.zeros([ROWS, GROUPS], tl.float32)
        for first in range(0, row_bytes, GROUPS * BYTES):
            low, high = _inputs(y_ptr + pair * INNER, first, row_bytes, KIND, GROUPS, BYTES)
            groups += _group_sums(
                codes_ptr + CODES_OFFSET, codes_ptr + SCALES_OFFSET, row, row_inside, first, low, high, row_bytes,
                KIND, N_SCALES, GROUPS, BYTES,
            )  # fmt: skip
        down = _row_sums(groups, codes_ptr + SCALES_OFFSET, row, row_inside, KIND)
        if bias_ptr is not None:
            down += tl.load(bias_ptr + expert.to(tl.int64) * HIDDEN + row, mask=row_inside, other=0).to(tl.float32)
        out += tl.load(weights_ptr + pair, mask=there, other=0).to(tl.float32) * down
    offset = token * HIDDEN + row
    if shared_ptr is not None:
        out += tl.load(shared_ptr + offset, mask=row < HIDDEN, other=0).to(tl.float32)
    if residual_ptr is not None:
        out += tl.load(residual_ptr + offset, mask=row < HIDDEN, other=0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=row < HIDDEN)


@triton.jit
def _inputs(x_ptr, first, row_bytes, KIND: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inputs, fp32 [GROUPS, BYTES], that meet the codes from byte `first` on: of low and of high nibbles, or twice of bytes."""
    group, byte = tl.arange(0, GROUPS)[:, None], tl.arange(0, BYTES)[None, :]
    inside = first + group * BYTES + byte < row_bytes
    if (KIND == INT4) | (KIND == MXFP4):
        column = 2 * (first + group * BYTES) + byte
        low = tl.load(x_ptr + column, mask=inside, other=0).to(tl.float32)
        return low, tl.load(x_ptr + column + BYTES, mask=inside, other=0).to(tl.float32)
    else:
        x = tl.load(x_ptr + first + group * BYTES + byte, mask=inside, other=0).to(tl.float32)
        return x, x


@triton.jit
def _group_sums(  # type: ignore[no-untyped-def]
    codes_ptr, scales_ptr, row, row_inside, first, low, high, row_bytes,
    KIND: tl.constexpr, N_SCALES: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Weights times inputs from byte `first` on, summed by group, fp32 [ROWS, GROUPS]; fp8 not yet scaled.

    A thread holds 16 neighbouring bytes: the sum over a group is its own work, or that of 2 or 4 threads.
    """
    group = tl.arange(0, GROUPS)
    at = first + group[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    inside = row_inside[:, None, None] & (at < row_bytes)[None, :, :]
    code_ptrs = codes_ptr + row[:, None, None] * row_bytes + at[None, :, :]
    codes = tl.load(code_ptrs, mask=inside, other=0, eviction_policy="evict_first")
    if KIND == FP8:
        return tl.sum(e4m3(codes) * low[None, :, :], axis=2)
    else:
        if KIND == INT8:
            products = codes.to(tl.int8, bitcast=True).to(tl.float32) * low[None, :, :]
        else:
            products = nibble(codes & 15, KIND) * low[None, :, :] + nibble(codes >> 4, KIND) * high[None, :, :]
        group = first // BYTES + group
        scale_inside = row_inside[:, None] & (group < N_SCALES)[None, :]
        scale_at = row[:, None] * N_SCALES + group[None, :]
        scales = group_scales(scales_ptr, scale_at, scale_inside, KIND)  # asked for before the sum needs registers
        return tl.sum(products, axis=2) * scales


@triton.jit
def _row_sums(groups, scales_ptr, row, row_inside, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 [ROWS] of group sums [ROWS, GROUPS], times the row's scale where the format has one."""
    sums = tl.sum(groups, axis=1)
    if KIND == FP8:
        sums *= tl.load(scales_ptr.to(tl.pointer_type(tl.float32)) + row, mask=row_inside, other=0)
    return sums
