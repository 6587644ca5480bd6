"""One expert's MLP and the weighted sum over a token's experts: the CPU path, in plain PyTorch.

y = down @ (silu(gate @ x) * (up @ x)) for each (token, expert) pair, then out[t] = sum_j weight[t, j] * y[t, j].

Per pair it reads 3 * H * I weights and does 6 * H * I FLOPs; at one token the floor is bytes / memory bandwidth.
Every expert's rows are computed by the same operations whether its weights were present or have just arrived, and the
sum runs over j in routing order: the result has the same bits in whatever order the experts become available.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WIDE_BELOW_ELEMENTS = 1 << 17  # of gate_up; measured: 1 to 6 rows at H = 192, I = 96 take 18-28 us wide and 30-50 us not,
WIDE_BELOW_ROWS = 8  # and at H = 512, I = 256 (2^18 elements) 57-124 us wide and 49-58 us not (one AVX-512 core, bf16)


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
    if x.dtype != torch.float32 and gate_up.numel() < WIDE_BELOW_ELEMENTS and len(x) < WIDE_BELOW_ROWS:
        return expert_mlp(x.float(), gate_up.float(), down.float()).to(x.dtype)
    gate, up = F.linear(x, gate_up).chunk(2, dim=1)
    return F.linear(F.silu(gate).mul_(up), down)


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
