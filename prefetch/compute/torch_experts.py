"""The CPU path: experts in plain PyTorch, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prefetch.compute.base import ExpertCompute, LayerCompute, Routed
from prefetch.geometry import ExpertKey
from prefetch.slots import SlotPool


class TorchLayer(LayerCompute):
    """One layer call."""

    def __init__(self, pool: SlotPool, routed: Routed):
        self.pool, self.work, self.form = pool, routed.work, routed.form
        self.weights = routed.weights.to(routed.hidden.dtype)
        self.inputs = routed.work.inputs(routed.hidden)
        self.rows: dict[int, Tensor] = {}  # expert -> [n, H], one row for each of its (token, rank) pairs

    def from_slots(self, keys: Sequence[ExpertKey], slots: Sequence[int]) -> None:
        operands = [self.pool.operands(slot) for slot in slots]
        experts = [key.expert for key in keys]
        found = self.form.mlps(experts, [self.inputs[expert] for expert in experts], operands)
        self.rows.update(zip(experts, found, strict=True))

    def in_place(self, keys: Sequence[ExpertKey], read: Callable[[ExpertKey], tuple[Tensor, Tensor]]) -> None:
        for key in keys:
            self.rows[key.expert] = self.form.mlp(key.expert, self.inputs[key.expert], *read(key))

    def finish(self) -> Tensor:
        return self.work.combine(self.rows, self.weights)


class TorchExperts(ExpertCompute):
    """Experts on the CPU, out of slots in RAM."""

    def __init__(self, pool: SlotPool):
        self.pool, self.device = pool, torch.device("cpu")

    def begin(self, layer: int, routed: Routed, in_place: Sequence[ExpertKey]) -> LayerCompute:
        return TorchLayer(self.pool, routed)
