"""The CPU path: experts in plain PyTorch, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.expert_mlp import expert_mlp, expert_mlps
from prefetch.compute.base import ExpertCompute, LayerCompute, Routed
from prefetch.geometry import ExpertKey
from prefetch.slots import SlotPool


class TorchLayer(LayerCompute):
    """One layer call."""

    def __init__(self, pool: SlotPool, routed: Routed):
        self.pool, self.work = pool, routed.work
        self.weights = routed.weights.to(routed.hidden.dtype)
        self.inputs = routed.work.inputs(routed.hidden)
        self.rows: dict[int, Tensor] = {}  # expert -> [n, H], one row for each of its (token, rank) pairs

    def from_slots(self, keys: Sequence[ExpertKey], slots: Sequence[int]) -> None:
        weights = [self.pool.expert(slot) for slot in slots]
        found = expert_mlps([self.inputs[key.expert] for key in keys], weights)
        self.rows.update((key.expert, outputs) for key, outputs in zip(keys, found, strict=True))

    def in_place(self, keys: Sequence[ExpertKey], read: Callable[[ExpertKey], tuple[Tensor, Tensor]]) -> None:
        for key in keys:
            self.rows[key.expert] = expert_mlp(self.inputs[key.expert], *read(key))

    def finish(self) -> Tensor:
        return self.work.combine(self.rows, self.weights)


class TorchExperts(ExpertCompute):
    """Experts on the CPU, out of slots in RAM."""

    def __init__(self, pool: SlotPool):
        self.pool, self.device = pool, torch.device("cpu")

    def begin(self, layer: int, routed: Routed, in_place: Sequence[ExpertKey]) -> LayerCompute:
        return TorchLayer(self.pool, routed)
