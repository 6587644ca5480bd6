"""A layer call in parts, cut where a check wants it cut: the parts as the host-driven runtime would send them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels.expert_form import ExpertForm
from kernels.moe_call import MoECall
from kernels.moe_parts import Part, PartKernels
from kernels.slot_table import addresses_of


def computed_in_parts(call: MoECall, cuts: Sequence[Sequence[int]]) -> Tensor:
    """The call's output [T, H], every pair of it in one of `cuts`; on meta tensors, launches and nothing else."""
    device = call.x.device
    table = replace(call.table, entries=torch.zeros(1, call.table.n_experts, dtype=torch.int64, device=device))
    kernels = PartKernels(table, torch.zeros(1, dtype=torch.int32, device=device))
    form = ExpertForm(call.activation, call.gate_up_bias, call.down_bias)
    parts = kernels.begin(call.x, call.ids, call.weights, form)
    for pairs in cuts:
        chosen = torch.tensor(pairs, device=device)
        ids = call.ids.view(-1).index_select(0, chosen).long()
        first = pairs[0] if list(pairs) == list(range(pairs[0], pairs[0] + len(pairs))) else None
        parts.add(Part(_addresses(call), ids, chosen, chosen // call.top_k, len(pairs), first))
    return parts.finish()


def _addresses(call: MoECall) -> Tensor:
    """int64 [E], of the call's layer."""
    entries = call.table.entries[call.layer]
    if call.table.by_address or entries.is_meta:
        return entries.long()
    rows = addresses_of(call.table.pools[0]).to(entries.device)
    return torch.where(entries < 0, 0, rows[entries.clamp(min=0).long()])
