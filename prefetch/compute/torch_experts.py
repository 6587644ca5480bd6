"""The CPU path: experts in plain PyTorch, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.expert_form import PLAIN, ExpertForm
from prefetch.compute.base import ExpertCompute, LayerCompute
from prefetch.dispatch import Dispatch
from prefetch.geometry import ExpertKey
from prefetch.slots import SlotPool


class TorchLayer(LayerCompute):
    """One layer call."""

    def __init__(self, pool: SlotPool, hidden: Tensor, topk_weights: Tensor, work: Dispatch, form: ExpertForm):
        self.pool, self.work, self.form = pool, work, form
        self.weights = topk_weights.to(hidden.dtype)
        self.inputs = work.inputs(hidden)
        self.rows: dict[int, Tensor] = {}  # expert -> [n, H], one row for each of its (token, rank) pairs

    def from_slots(self, keys: Sequence[ExpertKey], slots: Sequence[int]) -> None:
        operands = [self.pool.operands(slot) for slot in slots]
        experts = [key.expert for key in keys]
        found = self.form.mlps(experts, [self.inputs[expert] for expert in experts], operands)
        self.rows.update(zip(experts, found, strict=True))

    def in_place(self, key: ExpertKey, read: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.rows[key.expert] = self.form.mlp(key.expert, self.inputs[key.expert], *read())

    def finish(self) -> Tensor:
        return self.work.combine(self.rows, self.weights)


class TorchExperts(ExpertCompute):
    """Experts on the CPU, out of slots in RAM."""

    def __init__(self, pool: SlotPool):
        self.pool, self.device = pool, torch.device("cpu")

    def begin(
        self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, work: Dispatch, form: ExpertForm = PLAIN
    ) -> LayerCompute:
        return TorchLayer(self.pool, hidden, topk_weights, work, form)
