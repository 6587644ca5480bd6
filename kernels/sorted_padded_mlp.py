"""Expert MLPs in the design that serving engines share, as a peer to measure against: sort, pad, two GEMMs, sum.

Pairs are sorted by expert and every expert's group is padded to whole tiles; one GEMM computes gate and up, a second pass gates
them, a second GEMM multiplies by `down` and the routing weight, and a last pass sums over a token's experts. Tiles follow the default
rule that engines use where no tuned table exists: 16 x 32 x 64 up to as many tokens as experts, else 64 x 64 x 32. Alignment
is done by PyTorch on the device here. Weights are one contiguous [E, N, K] tensor each: no slots, no absent experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from kernels.compile_case import CompileCase, Expectations
from kernels.launch import FLOAT_DTYPES, Launch, check_launchable, check_tensor


def sorted_padded_mlp(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """out[t] = sum_j weights[t, j] * down[e] @ (silu(gate[e] @ x[t]) * up[e] @ x[t]), e = ids[t, j].

    Args:
        x: [T, H]; ids: int64 [T, k]; weights: [T, k]; gate_up: [E, 2I, H]; down: [E, H, I]; float tensors of one dtype.

    Raises:
        KernelInputError: the arguments do not fit, or this machine cannot run the kernel.
    """
    n_tokens, hidden = x.shape
    n_experts, inner = gate_up.shape[0], gate_up.shape[1] // 2
    check_tensor("x", x, [None, None], FLOAT_DTYPES, x.device)
    check_tensor("ids", ids, [n_tokens, None], [torch.int64], x.device)
    check_tensor("weights", weights, list(ids.shape), [x.dtype], x.device)
    check_tensor("gate_up", gate_up, [None, 2 * inner, hidden], [x.dtype], x.device)
    check_tensor("down", down, [n_experts, hidden, inner], [x.dtype], x.device)
    check_launchable(x.device)
    rows, columns, depth = (16, 32, 64) if n_tokens <= n_experts else (64, 64, 32)
    order, expert_of_tile = aligned(ids, n_experts, rows)
    top_k, n_pairs = ids.shape[1], ids.numel()
    both = x.new_empty(n_pairs, 2 * inner)
    _gemm(x, gate_up, both, order, expert_of_tile, None, top_k, (rows, columns, depth)).run()
    y = silu(both[:, :inner]) * both[:, inner:]
    out = x.new_empty(n_pairs, hidden)
    _gemm(y, down, out, order, expert_of_tile, weights, 1, (rows, columns, depth)).run()
    return out.view(n_tokens, top_k, hidden).sum(1)


def compile_cases() -> list[CompileCase]:
    """For the ahead-of-time compiler: gate and up of Qwen3-30B-A3B in bf16, with both tiles."""
    cases = []
    for n_tokens, tile in ((1, (16, 32, 64)), (512, (64, 64, 32))):
        x, both = (
            torch.empty(rows, width, dtype=torch.bfloat16, device="meta") for rows, width in ((n_tokens, 2048), (8, 1536))
        )
        weights = torch.empty(128, 1536, 2048, dtype=torch.bfloat16, device="meta")
        order, expert_of_tile = (torch.empty(n, dtype=torch.int64, device="meta") for n in (8 * tile[0], 8))
        launch = _gemm(x, weights, both, order, expert_of_tile, None, 8, tile)
        cases.append(CompileCase(f"Qwen3-30B-A3B T={n_tokens} bf16", launch, Expectations(tensor_cores=True)))
    return cases


def aligned(ids: Tensor, n_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Pairs by expert, each expert's padded to whole tiles; sizes depend on shapes alone, so that a graph can capture it.

    Returns:
        int64 [n_tiles * rows], pair at each place, n_pairs where padded; int64 [n_tiles], the expert of each tile, -1 = none.
    """
    flat = ids.reshape(-1)
    n_pairs = len(flat)
    n_tiles = min(n_pairs, triton.cdiv(n_pairs, rows) + min(n_experts, n_pairs))
    experts = torch.arange(n_experts, device=ids.device)
    count = (flat[:, None] == experts).sum(0)
    tiles = (count + rows - 1) // rows
    first_tile = tiles.cumsum(0) - tiles
    by_expert = flat.argsort(stable=True)
    rank = torch.arange(n_pairs, device=ids.device) - (count.cumsum(0) - count)[flat[by_expert]]
    order = torch.full((n_tiles * rows,), n_pairs, device=ids.device)
    order.scatter_(0, first_tile[flat[by_expert]] * rows + rank, by_expert)
    tile = torch.arange(n_tiles, device=ids.device)
    expert_of_tile = (tile[:, None] >= first_tile + tiles).sum(1)
    return order, torch.where(tile < tiles.sum(), expert_of_tile, -1)


def _gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    order: Tensor,
    expert_of_tile: Tensor,
    weights: Tensor | None,
    pairs_per_row: int,
    tile: tuple[int, int, int],
) -> Launch:
    rows, columns, depth = tile
    return Launch(
        _gemm_kernel,
        (len(expert_of_tile), triton.cdiv(b.shape[1], columns)),
        {
            "a_ptr": a,
            "b_ptr": b,
            "out_ptr": out,
            "order_ptr": order,
            "expert_ptr": expert_of_tile,
            "weights_ptr": weights,
            "n_pairs": out.shape[0],
            "n_columns": b.shape[1],
            "n_depth": b.shape[2],
            "pairs_per_row": pairs_per_row,
            "ROWS": rows,
            "COLUMNS": columns,
            "DEPTH": depth,
        },
        num_warps=4,
        num_stages=3,
    )


@triton.jit
def _gemm_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, out_ptr, order_ptr, expert_ptr, weights_ptr,
    n_pairs, n_columns, n_depth, pairs_per_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[pair, columns] = a[pair // pairs_per_row] @ b[expert]^T (* weight) for one tile of pairs of one expert."""
    expert = tl.load(expert_ptr + tl.program_id(0))
    if expert < 0:
        return
    pair = tl.load(order_ptr + tl.program_id(0) * ROWS + tl.arange(0, ROWS))
    inside = pair < n_pairs
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    a_ptrs = a_ptr + (pair // pairs_per_row)[:, None] * n_depth + depth[None, :]
    b_ptrs = b_ptr + expert * n_columns * n_depth + column[None, :].to(tl.int64) * n_depth + depth[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n_depth, DEPTH):
        deep = first + depth < n_depth
        a = tl.load(a_ptrs + first, mask=inside[:, None] & deep[None, :], other=0)
        b = tl.load(b_ptrs + first, mask=deep[:, None] & (column < n_columns)[None, :], other=0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if weights_ptr is not None:
        total *= tl.load(weights_ptr + pair, mask=inside, other=0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + pair[:, None] * n_columns + column[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (column < n_columns)[None, :])
