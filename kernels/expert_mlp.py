"""One expert's MLP and the weighted sum over a token's experts: the CPU path, in plain PyTorch.

y = down @ (silu(gate @ x) * (up @ x)) for each (token, expert) pair, then out[t] = sum_j weight[t, j] * y[t, j].

Per pair it reads 3 * H * I weights and does 6 * H * I FLOPs; at one token the floor is bytes / memory bandwidth.
Every expert's rows are computed by the same operations whether its weights were present or have just arrived, and the
sum runs over j in routing order: the result has the same bits in whatever order the experts become available.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

WIDE_BELOW_ELEMENTS = 1 << 17  # of gate_up; measured: 1 to 6 rows at H = 192, I = 96 take 18-28 us wide and 30-50 us not,
WIDE_BELOW_ROWS = 8  # and at H = 512, I = 256 (2^18 elements) 57-124 us wide and 49-58 us not (one AVX-512 core, bf16)

UNCUT_ELEMENTS = 32768  # at::internal::GRAIN_SIZE
ALIGNMENT_BYTES = 64  # of PyTorch's own allocations: a GEMM may sum in another order where its operand starts elsewhere


def expert_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert on the tokens routed to it.

    A 16-bit GEMM of oneDNN takes some 12 us to set up, more than a small expert's whole work: there the weights are widened
    to fp32 first, and only the result is rounded.

    Args:
        x: [n, H] router inputs of those tokens.
        gate_up: [2I, H], gate rows then up rows, same dtype as `x`.
        down: [H, I].

    Returns:
        [n, H], not yet weighted.
    """
    if _is_widened(x, gate_up):
        return expert_mlp(x.float(), gate_up.float(), down.float()).to(x.dtype)
    return F.linear(_activated(F.linear(x, gate_up)), down)


def expert_mlps(xs: Sequence[Tensor], weights: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Several experts of one layer, each on its own tokens: with one activation for all, the same bits as one at a time.

    Args:
        xs: for each expert its inputs, [n, H].
        weights: for each expert gate_up [2I, H] and down [H, I].

    Returns:
        For each expert its outputs, [n, H].
    """
    if len(xs) < 2:
        return [expert_mlp(x, *weight) for x, weight in zip(xs, weights, strict=True)]
    alone = [_is_widened(x, gate_up) for x, (gate_up, _) in zip(xs, weights, strict=True)]
    if weights[0][1].shape[1] * xs[0].element_size() % ALIGNMENT_BYTES or all(alone):
        return [expert_mlp(x, *weight) for x, weight in zip(xs, weights, strict=True)]
    if any(alone):
        others = [index for index, widened in enumerate(alone) if not widened]
        together = iter(expert_mlps([xs[index] for index in others], [weights[index] for index in others]))
        return [expert_mlp(xs[i], *weights[i]) if widened else next(together) for i, widened in enumerate(alone)]
    inner = torch.cat([F.linear(x, gate_up) for x, (gate_up, _) in zip(xs, weights, strict=True)])
    parts = _activated(inner).split([len(x) for x in xs])
    return [F.linear(part, down) for part, (_, down) in zip(parts, weights, strict=True)]


def _is_widened(x: Tensor, gate_up: Tensor) -> bool:
    return x.dtype != torch.float32 and gate_up.numel() < WIDE_BELOW_ELEMENTS and len(x) < WIDE_BELOW_ROWS


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
    if rows.shape[0] == 1:
        return torch.mm(weights, rows[0])
    return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)
