"""Expert MLPs at decode: two matrix-vector launches over (token, expert) pairs. No sort, no padding, no atomics.

1. gate-up: y[pair] = gated(gate_up @ x[token] + bias), one program per pair and block of I;
2. down:    out[t] = sum_j weights[t, j] * (down[ids[t, j]] @ y[t, j] + bias) (+ shared) (+ residual), one program per token and
   block of H, which holds all k experts of the token: the sum stays in registers and has one order.

Bytes: 3 * H * I weights per pair, from the pool to registers in 16-byte loads, once; everything else is below 1 %.
FLOPs: 6 * H * I per pair. Tokens that share an expert read it once each: `grouped_mlp` is for them (`moe_mlp` chooses).

What hides the latency of memory is a tile on its way while another is multiplied. Loads of the same round would not do: ptxas moves a load
down to its use, until one is on its way at a time. A value carried from round to round cannot move.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compile_case import CompileCase, Expectations, meta_outputs, model_calls
from kernels.gated_activation import gated_activation
from kernels.launch import Launch, check_launchable
from kernels.moe_call import MoECall
from kernels.slot_table import expert_rows
from prefetch.errors import KernelInputError

MAX_PAIRS = 65_535  # CUDA's limit on a grid's second axis


@dataclass(frozen=True)
class DecodeTiles:
    """Block sizes of both kernels, in elements. A thread of 4 warps holds `block / 128` weights of each matrix at a time."""

    gate_up_rows: int  # of gate, and as many of up
    gate_up_columns: int
    down_rows: int
    down_columns: int
    num_warps: int = 4


def decode_tiles(hidden: int, intermediate: int, top_k: int, n_bytes: int) -> DecodeTiles:
    """8 loads of 16 bytes a thread: 8 KB each of gate and up, 16 KB of down, `n_bytes` an element.

    Long rows keep a warp's 32 loads on one row: contiguous, and its sum needs no other warp.
    """
    longest = 512 // n_bytes
    gate_up_columns = min(longest, triton.next_power_of_2(hidden))
    down_columns = min(longest, triton.next_power_of_2(intermediate))
    return DecodeTiles(
        gate_up_rows=min(8192 // n_bytes // gate_up_columns, 16),
        gate_up_columns=gate_up_columns,
        down_rows=max(4, min(16384 // n_bytes // (down_columns * triton.next_power_of_2(top_k)), 16)),
        down_columns=down_columns,
    )


def decode_mlp(call: MoECall, out: Tensor | None = None, missed: Tensor | None = None) -> Tensor:
    """The expert part of one MoE layer for few tokens.

    Args:
        call: what to compute.
        out: [T, H] for the result, like `call.x`; by default new memory.
        missed: int32 [1], set to 1 where a token needs an absent expert, else left alone. By default nobody is told.

    Returns:
        `out`.

    Raises:
        KernelInputError: `out` or `missed` do not fit, or this machine cannot run the kernels; nothing has been launched then.
    """
    out = torch.empty_like(call.x) if out is None else out
    missed = call.ids.new_zeros(1, dtype=torch.int32) if missed is None else missed
    launches = decode_launches(call, out, missed)
    check_launchable(call.x.device)
    for launch in launches:
        launch.run()
    return out


def decode_launches(call: MoECall, out: Tensor, missed: Tensor) -> tuple[Launch, Launch]:
    """Both launches, checked and not yet run."""
    call.check_outputs(out, missed)
    if call.n_pairs > MAX_PAIRS:
        raise KernelInputError(
            f"{call.n_pairs} (token, expert) pairs: the decode kernels take at most {MAX_PAIRS}; use grouped_mlp"
        )
    size = call.table.geometry
    tiles = decode_tiles(size.hidden, size.intermediate, call.top_k, size.dtype.itemsize)
    y = call.x.new_empty(call.n_pairs, size.intermediate)
    common = {
        **call.table.arguments(call.layer),
        "ids_ptr": call.ids,
        "y_ptr": y,
        "top_k": call.top_k,
        "HIDDEN": size.hidden,
        "INNER": size.intermediate,
    }
    gate_up = Launch(
        _gate_up_kernel,
        (triton.cdiv(size.intermediate, tiles.gate_up_rows), call.n_pairs),
        {
            **common,
            **call.activation.constants,
            "x_ptr": call.x,
            "bias_ptr": call.gate_up_bias,
            "missed_ptr": missed,
            "width": size.hidden,
            "ROWS": tiles.gate_up_rows,
            "COLUMNS": tiles.gate_up_columns,
        },
        num_warps=tiles.num_warps,
    )
    down = Launch(
        _down_kernel,
        (triton.cdiv(size.hidden, tiles.down_rows), call.n_tokens),
        {
            **common,
            "weights_ptr": call.weights,
            "bias_ptr": call.down_bias,
            "shared_ptr": call.shared,
            "residual_ptr": call.residual,
            "out_ptr": out,
            "width": size.intermediate,
            "DOWN_OFFSET": size.down_offset // size.dtype.itemsize,
            "RANKS": triton.next_power_of_2(call.top_k),
            "ROWS": tiles.down_rows,
            "COLUMNS": tiles.down_columns,
        },
        num_warps=tiles.num_warps,
    )
    return gate_up, down


def compile_cases() -> list[CompileCase]:
    """For the ahead-of-time compiler: both launches at real models' sizes.

    fp32 is for tests, and LLVM puts each of its loads into a branch of its own on gfx942, with a wait at the end.
    """
    return [
        CompileCase(name, launch, Expectations(wide_loads=True, kilobytes_in_flight=0 if "fp32" in name else 16))
        for name, call in model_calls(tokens=(1, 8))
        for launch in decode_launches(call, *meta_outputs(call))
    ]


@triton.constexpr_function
def lanes(columns: int, dtype: tl.dtype) -> int:
    """Neighbouring weights of one 16-byte load: their sum is one thread's own work."""
    return min(columns, 128 // dtype.primitive_bitwidth)


@triton.jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x_ptr, ids_ptr, entries_ptr, pool_ptr, bias_ptr, y_ptr, missed_ptr,
    row_stride, n_slots, n_experts, top_k, width,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, BY_ADDRESS: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_SHIFT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[pair, rows] for one pair and ROWS rows of gate and the same of up. Blocks are [ROWS, SPANS, LANES].

    `width` is HIDDEN, at run time: LLVM unrolls a loop whose length it knows until registers spill.
    """
    pair = tl.program_id(1).to(tl.int64)
    token = pair // top_k
    expert = tl.load(ids_ptr + pair)
    weights, there = expert_rows(entries_ptr, pool_ptr, row_stride, n_slots, n_experts, expert, BY_ADDRESS)
    if (expert >= 0) & (there == 0):
        tl.store(missed_ptr, 1)

    LANES: tl.constexpr = lanes(COLUMNS, pool_ptr.dtype.element_ty)
    SPANS: tl.constexpr = COLUMNS // LANES
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = (row < INNER) & there
    column = tl.arange(0, SPANS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    x_ptrs = x_ptr + token * HIDDEN + column
    gate_ptrs = weights + row[:, None, None] * HIDDEN + column[None, :, :]
    up_ptrs = gate_ptrs + INNER * HIDDEN
    inside = row_inside[:, None, None] & (column < HIDDEN)[None, :, :]
    gate_ahead = tl.load(gate_ptrs, mask=inside, other=0, eviction_policy="evict_first")
    up_ahead = tl.load(up_ptrs, mask=inside, other=0, eviction_policy="evict_first")
    gate = tl.zeros([ROWS, SPANS], tl.float32)
    up = tl.zeros([ROWS, SPANS], tl.float32)
    for first in range(0, width, COLUMNS):
        gate_now, up_now = gate_ahead, up_ahead
        following = first + COLUMNS
        inside = row_inside[:, None, None] & (following + column < HIDDEN)[None, :, :]
        gate_ahead = tl.load(gate_ptrs + following, mask=inside, other=0, eviction_policy="evict_first")
        up_ahead = tl.load(up_ptrs + following, mask=inside, other=0, eviction_policy="evict_first")
        x = tl.load(x_ptrs + first, mask=first + column < HIDDEN, other=0).to(tl.float32)[None, :, :]
        gate += tl.sum(gate_now.to(tl.float32) * x, axis=2)
        up += tl.sum(up_now.to(tl.float32) * x, axis=2)
    gate_sum = tl.sum(gate, axis=1)
    up_sum = tl.sum(up, axis=1)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * (2 * INNER) + row
        gate_sum += tl.load(bias_ptrs, mask=row_inside, other=0).to(tl.float32)
        up_sum += tl.load(bias_ptrs + INNER, mask=row_inside, other=0).to(tl.float32)
    y = tl.where(there, gated_activation(gate_sum, up_sum, ALPHA, LIMIT, UP_SHIFT), 0.0)
    tl.store(y_ptr + pair * INNER + row, y.to(y_ptr.dtype.element_ty), mask=row < INNER)


@triton.jit
def _down_kernel(  # type: ignore[no-untyped-def]
    y_ptr, ids_ptr, weights_ptr, entries_ptr, pool_ptr, bias_ptr, shared_ptr, residual_ptr, out_ptr,
    row_stride, n_slots, n_experts, top_k, width,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, BY_ADDRESS: tl.constexpr, DOWN_OFFSET: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[token, rows]. Blocks are [ROWS, RANKS, SPANS, LANES]: all experts of the token at once. Ranks before spans: then warps take turns
    on them, and a thread needs y of few.

    `width` is INNER, at run time for the same reason as above.
    """
    token = tl.program_id(1).to(tl.int64)
    rank = tl.arange(0, RANKS)
    pair = token * top_k + rank
    expert = tl.load(ids_ptr + pair, mask=rank < top_k, other=-1)
    experts, there = expert_rows(entries_ptr, pool_ptr, row_stride, n_slots, n_experts, expert, BY_ADDRESS)
    weight = tl.load(weights_ptr + pair, mask=rank < top_k, other=0).to(tl.float32)
    weight = tl.where(there, weight, 0.0)  # not a mask of the load, which would then wait for the table

    LANES: tl.constexpr = lanes(COLUMNS, pool_ptr.dtype.element_ty)
    SPANS: tl.constexpr = COLUMNS // LANES
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = (row < HIDDEN)[:, None] & there[None, :]
    column = tl.arange(0, SPANS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    y_ptrs = y_ptr + pair[:, None, None] * INNER + column[None, :, :]
    row_ptrs = experts[None, :] + DOWN_OFFSET + row[:, None] * INNER
    down_ptrs = row_ptrs[:, :, None, None] + column[None, None, :, :]
    inside = row_inside[:, :, None, None] & (column < INNER)[None, None, :, :]
    down_ahead = tl.load(down_ptrs, mask=inside, other=0, eviction_policy="evict_first")
    total = tl.zeros([ROWS, RANKS, SPANS], tl.float32)
    for first in range(0, width, COLUMNS):
        down_now = down_ahead
        following = first + COLUMNS
        inside = row_inside[:, :, None, None] & (following + column < INNER)[None, None, :, :]
        down_ahead = tl.load(down_ptrs + following, mask=inside, other=0, eviction_policy="evict_first")
        y_inside = there[:, None, None] & (first + column < INNER)[None, :, :]
        y = tl.load(y_ptrs + first, mask=y_inside, other=0).to(tl.float32)[None, :, :, :]
        total += tl.sum(down_now.to(tl.float32) * y, axis=3)
    down = tl.sum(total, axis=2)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert.to(tl.int64)[None, :] * HIDDEN + row[:, None]
        down += tl.load(bias_ptrs, mask=row_inside, other=0).to(tl.float32)
    out = tl.sum(down * weight[None, :], axis=1)
    offset = token * HIDDEN + row
    if shared_ptr is not None:
        out += tl.load(shared_ptr + offset, mask=row < HIDDEN, other=0).to(tl.float32)
    if residual_ptr is not None:
        out += tl.load(residual_ptr + offset, mask=row < HIDDEN, other=0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=row < HIDDEN)
