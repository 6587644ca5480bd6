"""One expert's MLP and the weighted sum over a token's experts: the CPU path, in plain PyTorch.

y = down @ (silu(gate @ x) * (up @ x)) for each (token, expert) pair, then out[t] = sum_j weight[t, j] * y[t, j].

Per pair it reads 3 * H * I weights and does 6 * H * I FLOPs; at one token the floor is bytes / memory bandwidth.
Every expert's rows are computed by the same operations whether its weights were present or have just arrived, and the
sum runs over j in routing order: the result has the same bits in whatever order the experts become available.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL_ELEMENTS = 1 << 17  # of gate_up in 16 bits: below, copying an expert costs less than setting up its GEMMs
WIDENED_ROWS = 4  # measured at H = 192, I = 96: up to so many rows widening is quicker than a batch, from 8 on slower
STACKED_AT_ONCE = 16  # experts in one batch: their copies stay in a core's cache
UNCUT_ELEMENTS = 32768  # at::internal::GRAIN_SIZE
ALIGNMENT_BYTES = 64  # of PyTorch's own allocations: a GEMM may sum in another order where its operand starts elsewhere

Operands = tuple[Tensor, Tensor]  # gate_up.t() [H, 2I] and down.t() [I, H]: what inputs are multiplied by


def expert_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert on the tokens routed to it.

    Args:
        x: [n, H] router inputs of those tokens.
        gate_up: [2I, H], gate rows then up rows, same dtype as `x`.
        down: [H, I].

    Returns:
        [n, H], not yet weighted.
    """
    return expert_mlps([x], [(gate_up.t(), down.t())])[0]


def expert_mlps(xs: Sequence[Tensor], operands: Sequence[Operands]) -> list[Tensor]:
    """Several experts of one layer, each on its own tokens: the same bits as one at a time.

    Each is multiplied where it lies, and all share one activation. But a 16-bit GEMM of oneDNN takes 12 to 30 us to set up, more than a
    small expert's whole work: such experts are widened to fp32 where they have few rows, else copied together and multiplied as
    one batch. Which of these it is depends on the expert and its rows alone.

    Args:
        xs: for each expert its inputs, [n, H].
        operands: for each expert its weights; all of one shape and dtype.

    Returns:
        For each expert its outputs, [n, H].
    """
    if not xs:
        return []
    gate_ups, downs = [gate_up for gate_up, _ in operands], [down for _, down in operands]
    if downs[0].shape[0] * downs[0].itemsize % ALIGNMENT_BYTES and len(xs) > 1:
        return [rows for x, operand in zip(xs, operands, strict=True) for rows in expert_mlps([x], [operand])]
    if gate_ups[0].numel() >= SMALL_ELEMENTS or not _sets_up_slowly(xs[0].dtype):
        return _one_by_one(xs, gate_ups, downs)
    alike = defaultdict(list)  # rows as computed, 0 for widened ones -> experts
    for index, x in enumerate(xs):
        alike[_padded(len(x)) if len(x) > WIDENED_ROWS else 0].append(index)
    found: dict[int, Tensor] = {}
    for n_rows, members in alike.items():
        parts = [[tensors[index] for index in members] for tensors in (xs, gate_ups, downs)]
        found.update(zip(members, _batches(n_rows, *parts) if n_rows else _widened(*parts), strict=True))
    return [found[index] for index in range(len(xs))]


@cache
def _sets_up_slowly(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies `dtype` through oneDNN, as it does 16 bits where the CPU has AVX-512."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _one_by_one(xs: Sequence[Tensor], gate_ups: list[Tensor], downs: list[Tensor]) -> list[Tensor]:
    n_rows = [len(x) for x in xs]
    gated = _activated(_products(xs, gate_ups, n_rows)).split(n_rows)
    return list(_products(gated, downs, n_rows).split(n_rows))


def _widened(xs: list[Tensor], gate_ups: list[Tensor], downs: list[Tensor]) -> list[Tensor]:
    return [rows.to(x.dtype) for rows, x in zip(_one_by_one([x.float() for x in xs], gate_ups, downs), xs, strict=True)]


def _products(xs: Sequence[Tensor], operands: list[Tensor], n_rows: list[int]) -> Tensor:
    """[rows of all, columns]: each of `xs` times its operand. One that is not in fp32 as `xs` are is widened just before its use,
    into memory that the one before has left in the cache."""
    products = xs[0].new_empty(sum(n_rows), operands[0].shape[1])
    widens = operands[0].dtype != products.dtype
    for x, operand, rows in zip(xs, operands, products.split(n_rows), strict=True):
        torch.mm(x, operand.float() if widens else operand, out=rows)
    return products


def _padded(n_rows: int) -> int:
    """Rows of an expert in a batch: the next power of two."""
    return 1 << (n_rows - 1).bit_length()


def _batches(n_rows: int, xs: list[Tensor], gate_ups: list[Tensor], downs: list[Tensor]) -> Iterator[Tensor]:
    """Experts whose rows are padded to `n_rows`, a batch of them at a time."""
    for start in range(0, len(xs), STACKED_AT_ONCE):
        batch = slice(start, start + STACKED_AT_ONCE)
        for x, outputs in zip(xs[batch], _batch(n_rows, xs[batch], gate_ups[batch], downs[batch]), strict=True):
            yield outputs[: len(x)]


def _batch(n_rows: int, xs: list[Tensor], gate_ups: list[Tensor], downs: list[Tensor]) -> Tensor:
    """[experts, n_rows, H], of which the first len(x) rows of each expert are its outputs."""
    padded = xs[0].new_zeros(len(xs), n_rows, xs[0].shape[1])
    for x, rows in zip(xs, padded, strict=True):
        rows[: len(x)] = x
    inner = torch.bmm(padded, _stacked(gate_ups))
    gated = _activated(inner.flatten(0, 1)).view(len(xs), n_rows, -1)
    return torch.bmm(gated, _stacked(downs))


def _stacked(operands: list[Tensor]) -> Tensor:
    """[experts, columns, rows] of [columns, rows] operands, copied as they lie in memory."""
    return torch.stack([operand.t() for operand in operands]).transpose(1, 2)


def _activated(inner: Tensor) -> Tensor:
    """silu(gate) * up, [n, I], of [n, 2I]. In blocks that PyTorch's threads do not cut: where they do, silu rounds differently."""
    n_inner = inner.shape[1] // 2
    blocks = inner.split(max(1, UNCUT_ELEMENTS // n_inner))
    halves = [block.chunk(2, dim=1) for block in blocks]
    done = [F.silu(gate).mul_(up) for gate, up in halves]
    return done[0] if len(done) == 1 else torch.cat(done)


def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """out[t] = sum_j weights[t, j] * rows[t, j], j in routing order.

    Args:
        rows: [T, k, H] expert outputs.
        weights: [T, k] routing weights, same dtype.

    Returns:
        [T, H].
    """
    if rows.dtype in (torch.float16, torch.bfloat16):  # as above: setting up a 16-bit product takes longer than this sum
        return weighted_sum(rows.float(), weights.float()).to(rows.dtype)
    if rows.shape[0] == 1:
        return torch.mm(weights, rows[0])
    return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)
