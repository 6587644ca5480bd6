"""The GPU path: experts by Triton kernels, out of slots in device memory or across the link out of pinned host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.expert_form import PLAIN, ExpertForm
from kernels.expert_mlp import weighted_sum
from kernels.moe_call import MoECall
from kernels.moe_parts import MoEParts
from kernels.quantised_experts import expert_table
from prefetch.compute.base import ExpertCompute, LayerCompute
from prefetch.dispatch import Dispatch
from prefetch.errors import TransferError
from prefetch.geometry import ExpertKey, MoEGeometry
from prefetch.slots import SlotPool


class KernelLayer(LayerCompute):
    """One layer call. Everything is enqueued on the current stream; nothing waits for the device."""

    def __init__(
        self,
        experts: KernelExperts,
        layer: int,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        work: Dispatch,
        form: ExpertForm,
    ):
        self.experts, self.layer, self.work, self.form = experts, layer, work, form
        self.hidden, self.weights = hidden.contiguous(), weights
        call = MoECall(self.hidden, ids, weights, experts.table, layer, *form.parts)
        self.parts = MoEParts(call, experts.missed)
        self.rows_of_cpu: dict[int, Tensor] = {}  # expert -> [n, H] on the host
        self.inputs_of_cpu: dict[int, Tensor] | None = None

    def from_slots(self, keys: Sequence[ExpertKey], slots: Sequence[int]) -> None:
        if keys:
            self._add(keys, [self.experts.pool.address(slot) for slot in slots])

    def in_place(self, key: ExpertKey, read: Callable[[], tuple[Tensor, Tensor]]) -> None:
        if self.experts.mapped_address is not None:
            self._add([key], [self.experts.mapped_address(key)])
            return
        if self.inputs_of_cpu is None:
            self.inputs_of_cpu = self.work.inputs(self.hidden.cpu())
        self.rows_of_cpu[key.expert] = self.form.mlp(key.expert, self.inputs_of_cpu[key.expert], *read())
        self.parts.leave_out(self._pairs_of([key]))

    def finish(self) -> Tensor:
        return self.parts.finish(self._sum_of_cpu() if self.rows_of_cpu else None)

    def _add(self, keys: Sequence[ExpertKey], addresses: Sequence[int]) -> None:
        """A copy out of pageable memory is staged by the driver at once: the host may go on, and change what it copied."""
        table = torch.zeros(self.experts.table.n_experts, dtype=torch.int64)
        table[[key.expert for key in keys]] = torch.tensor(addresses)
        self.experts.table.entries[self.layer].copy_(table, non_blocking=True)
        self.parts.add(self._pairs_of(keys))

    def _pairs_of(self, keys: Sequence[ExpertKey]) -> Tensor:
        pairs = torch.tensor([pair for key in keys for pair in self.work.pairs[key.expert]])
        return pairs.to(self.hidden.device, non_blocking=True)

    def _sum_of_cpu(self) -> Tensor:
        """[T, H], the weighted sum over the experts that the CPU computed: added on the device, like a shared expert's output."""
        n_tokens, hidden_size = self.hidden.shape
        rows = torch.zeros(n_tokens * self.work.top_k, hidden_size, dtype=self.hidden.dtype)
        for expert, outputs in self.rows_of_cpu.items():
            rows[self.work.pairs[expert]] = outputs
        total = weighted_sum(rows.view(n_tokens, self.work.top_k, -1), self.weights.cpu().to(rows.dtype))
        return total.to(self.hidden.device)


class KernelExperts(ExpertCompute):
    """Experts by Triton kernels.

    Args:
        pool: the slots, on the device that computes.
        mapped_address: where a kernel finds an expert's row in pinned host memory. Given, experts without a slot are read there
            by the kernels (zero-copy); None: the CPU computes them.
    """

    def __init__(self, geometry: MoEGeometry, pool: SlotPool, mapped_address: Callable[[ExpertKey], int] | None = None):
        self.pool, self.mapped_address = pool, mapped_address
        self.device = pool.rows.device
        entries = torch.zeros(geometry.n_layers, geometry.n_experts, dtype=torch.int64, device=self.device)
        self.table = expert_table(geometry.expert, (pool.rows,), entries)
        self.missed = torch.zeros(1, dtype=torch.int32, device=self.device)

    def begin(
        self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, work: Dispatch, form: ExpertForm = PLAIN
    ) -> LayerCompute:
        return KernelLayer(self, layer, hidden, topk_ids, topk_weights, work, form)

    def check(self) -> None:
        """Waits for the device.

        Raises:
            TransferError: a kernel was given an expert that was not there, and computed zeros.
        """
        if int(self.missed):
            raise TransferError("a kernel needed an expert that was in no slot, and computed zeros: please report it")

    def enter(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.nvtx.range_push(name)

    def leave(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.nvtx.range_pop()
