"""What the expert part of an MoE layer computes: its arguments, their checks, and the PyTorch reference.

out[t] = sum_j weights[t, j] * expert[ids[t, j]](x[t])  (+ shared[t]) (+ residual[t])
expert(x) = down @ gated(gate_up @ x + gate_up_bias) + down_bias

`decode_mlp` and `grouped_mlp` are two ways to compute it, `moe_mlp` chooses. Both sum over j in one fixed order, in fp32,
without atomics: two runs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gated_activation import SWIGLU, GatedActivation, gated_activation_reference
from kernels.launch import check_aligned, check_tensor
from kernels.slot_table import ExpertTable
from prefetch.errors import KernelInputError


@dataclass(frozen=True)
class MoECall:
    """Arguments of one layer call, T tokens, k experts each.

    Args:
        x: [T, H], in the experts' dtype.
        ids: int32 or int64 [T, k], the router's choice. An id below 0 is padding: it contributes nothing and is no miss.
        weights: [T, k], fp32 or the experts' dtype.
        table: where the experts are.
        layer: its row in the table.
        activation: the gate's formula.
        gate_up_bias: [E, 2I]; down_bias: [E, H]; both or neither. Always resident, unlike the weights (gpt-oss: 17 KB an expert).
        shared: [T, H], the shared experts' output; residual: [T, H]. Both are added in fp32 before the one rounding.

    Raises:
        KernelInputError: what no kernel could read rightly. Ids and table entries out of range are found on the device.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor
    table: ExpertTable
    layer: int
    activation: GatedActivation = SWIGLU
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    shared: Tensor | None = None
    residual: Tensor | None = None

    def __post_init__(self) -> None:
        size, device, dtypes = self.table.geometry, self.x.device, [self.table.geometry.dtype]
        n_experts, rows = self.table.n_experts, [self.x.shape[0], size.hidden]
        check_tensor("x", self.x, [None, size.hidden], dtypes, device)
        check_tensor("ids", self.ids, [self.x.shape[0], None], [torch.int32, torch.int64], device)
        check_tensor("weights", self.weights, list(self.ids.shape), sorted({torch.float32, size.dtype}, key=str), device)
        if self.top_k > n_experts:
            raise KernelInputError(f"ids has {self.top_k} experts a token, the table only {n_experts} a layer")
        if self.table.entries.device != device:
            raise KernelInputError(f"the expert table is on {self.table.entries.device}, x on {device}: put both on one device")
        if (self.gate_up_bias is None) != (self.down_bias is None):
            raise KernelInputError("gate_up_bias and down_bias come together: pass both or neither")
        for name, tensor, shape in (
            ("gate_up_bias", self.gate_up_bias, [n_experts, 2 * size.intermediate]),
            ("down_bias", self.down_bias, [n_experts, size.hidden]),
            ("shared", self.shared, rows),
            ("residual", self.residual, rows),
        ):
            if tensor is not None:
                check_tensor(name, tensor, shape, dtypes, device)
        check_aligned("x", self.x)

    @property
    def n_tokens(self) -> int:
        return int(self.x.shape[0])

    @property
    def top_k(self) -> int:
        return int(self.ids.shape[1])

    @property
    def n_pairs(self) -> int:
        return self.n_tokens * self.top_k

    def check_outputs(self, out: Tensor, missed: Tensor) -> None:
        """`out` is [T, H] like x, and not x itself, which other programs still read; `missed` is int32 [1]."""
        check_tensor("out", out, list(self.x.shape), [self.x.dtype], self.x.device)
        check_tensor("missed", missed, [1], [torch.int32], self.x.device)
        check_aligned("out", out)
        if out.device.type != "meta" and out.data_ptr() == self.x.data_ptr():
            raise KernelInputError("out is x: the result needs memory of its own (it may be that of residual)")


def moe_mlp_reference(call: MoECall, dtype: torch.dtype = torch.float32) -> tuple[Tensor, bool]:
    """The call in plain PyTorch, expert by expert, all arithmetic in `dtype`.

    Returns:
        [T, H] in `dtype`, and whether an expert that a token needs was absent (its share is zero).
    """
    size, out = call.table.geometry, torch.zeros(call.x.shape, dtype=dtype, device=call.x.device)
    missed = False
    for expert in call.ids[call.ids >= 0].unique().tolist():
        found = call.table.expert(call.layer, expert) if expert < call.table.n_experts else None
        if found is None:
            missed = True
            continue
        gate_up, down = (weight.to(dtype) for weight in found)
        tokens, ranks = torch.where(call.ids == expert)
        inner = call.x[tokens].to(dtype) @ gate_up.T
        if call.gate_up_bias is not None:
            inner += call.gate_up_bias[expert].to(dtype)
        rows = (
            gated_activation_reference(inner[:, : size.intermediate], inner[:, size.intermediate :], call.activation) @ down.T
        )
        if call.down_bias is not None:
            rows += call.down_bias[expert].to(dtype)
        out.index_add_(0, tokens, call.weights[tokens, ranks].to(dtype)[:, None] * rows)
    for addend in (call.shared, call.residual):
        if addend is not None:
            out += addend.to(dtype)
    return out, missed
