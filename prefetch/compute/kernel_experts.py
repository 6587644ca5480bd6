"""The GPU path: experts by Triton kernels, out of slots in device memory or across the link out of pinned host memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from kernels.expert_form import ExpertForm
from kernels.expert_mlp import weighted_sum
from kernels.moe_parts import Part, PartKernels
from kernels.quantised_experts import expert_table
from prefetch.compute.base import ExpertCompute, LayerCompute, Routed
from prefetch.compute.exchange import Exchange
from prefetch.errors import TransferError
from prefetch.geometry import ExpertKey, MoEGeometry
from prefetch.slots import SlotPool


class KernelLayer(LayerCompute):
    """One layer call. Everything is enqueued on the current stream; the host waits for the device only where it computes itself."""

    def __init__(self, experts: KernelExperts, routed: Routed, in_place: Sequence[ExpertKey]):
        self.experts, self.routed, self.work = experts, routed, routed.work
        self.hidden = routed.hidden.contiguous()
        # Before anything is enqueued that the host would wait for as well.
        on_cpu = in_place if experts.mapped_address is None else ()
        self.hidden_on_host = experts.exchange.fetch([self.hidden])[0] if on_cpu else None
        self.form_on_host = experts.form_on_host(on_cpu[0].layer, routed.form) if on_cpu else routed.form
        self.parts = experts.kernels.begin(self.hidden, routed.ids, routed.weights, routed.form)
        self.expected: dict[ExpertKey, Part] = {}
        self.rows_of_cpu: dict[int, Tensor] = {}  # expert -> [n, H] on the host

    def expect(self, keys: Sequence[ExpertKey], slots: Sequence[int]) -> None:
        addresses = [self.experts.pool.address(slot) for slot in slots]
        parts = self.experts.prepare(self.work.pairs, self.work.top_k, [[key] for key in keys], addresses)
        self.expected.update(zip(keys, parts, strict=True))

    def from_slots(self, keys: Sequence[ExpertKey], slots: Sequence[int]) -> None:
        if len(keys) == 1 and keys[0] in self.expected:
            self.parts.add(self.expected[keys[0]])
        elif keys:
            self._add(keys, [self.experts.pool.address(slot) for slot in slots])

    def in_place(self, keys: Sequence[ExpertKey], read: Callable[[ExpertKey], tuple[Tensor, Tensor]]) -> None:
        if self.experts.mapped_address is not None:
            self._add(keys, [self.experts.mapped_address(key) for key in keys])
            return
        assert self.hidden_on_host is not None, "what is computed in place is named when the call begins"
        inputs = self.work.inputs(self.hidden_on_host)
        self.parts.leave_out(self.experts.exchange.send(array("q", [p for key in keys for p in self.work.pairs[key.expert]])))
        for key in keys:
            self.rows_of_cpu[key.expert] = self.form_on_host.mlp(key.expert, inputs[key.expert], *read(key))

    def finish(self) -> Tensor:
        return self.parts.finish(self._sum_of_cpu() if self.rows_of_cpu else None)

    def _add(self, keys: Sequence[ExpertKey], addresses: Sequence[int]) -> None:
        [part] = self.experts.prepare(self.work.pairs, self.work.top_k, [keys], addresses)
        self.parts.add(part)

    def _sum_of_cpu(self) -> Tensor:
        """[T, H], the weighted sum over the experts that the CPU computed: added on the device, like a shared expert's output."""
        n_tokens, hidden_size = self.hidden.shape
        rows = torch.zeros(n_tokens * self.work.top_k, hidden_size, dtype=self.hidden.dtype)
        for expert, outputs in self.rows_of_cpu.items():
            rows[self.work.pairs[expert]] = outputs
        total = weighted_sum(rows.view(n_tokens, self.work.top_k, -1), self.routed.weights_on_host.to(rows.dtype))
        return self.experts.exchange.send_tensor(total)


class KernelExperts(ExpertCompute):
    """Experts by Triton kernels.

    Args:
        pool: the slots, on the device that computes.
        mapped_address: where a kernel finds an expert's row in pinned host memory. Given, experts without a slot are read there
            by the kernels (zero-copy); None: the CPU computes them.
    """

    enqueues = True

    def __init__(self, geometry: MoEGeometry, pool: SlotPool, mapped_address: Callable[[ExpertKey], int] | None = None):
        self.pool, self.mapped_address = pool, mapped_address
        self.device = pool.rows.device
        self.exchange = Exchange(self.device)
        self.missed = torch.zeros(1, dtype=torch.int32, device=self.device)
        entries = torch.zeros(1, geometry.n_experts, dtype=torch.int64, device=self.device)
        self.kernels = PartKernels(expert_table(geometry.expert, (pool.rows,), entries), self.missed)
        self.n_experts = geometry.n_experts
        self._forms_on_host: dict[int, ExpertForm] = {}  # by layer
        self.no_addresses = array("q", [0] * _even(geometry.n_experts))

    def begin(self, layer: int, routed: Routed, in_place: Sequence[ExpertKey]) -> LayerCompute:
        return KernelLayer(self, routed, in_place)

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.exchange.fetch(tensors)

    def wait(self) -> None:
        self.exchange.wait()

    def form_on_host(self, layer: int, form: ExpertForm) -> ExpertForm:
        """The form of the experts of `layer`, for the CPU. Biases cross the link once: fetched at each use, they would come behind the hits."""
        if layer not in self._forms_on_host:
            self._forms_on_host[layer] = form.to(torch.device("cpu"))
        return self._forms_on_host[layer]

    def prepare(
        self, pairs_of: dict[int, list[int]], top_k: int, parts: Sequence[Sequence[ExpertKey]], addresses: Sequence[int]
    ) -> list[Part]:
        """Parts of one layer call on the device, sent at once: one table for all, then each part's ids, pairs and tokens.

        Args:
            pairs_of: each expert's pairs.
            addresses: where the rows of all keys are, part after part.
        """
        words, widths = self.no_addresses[:], [len(self.no_addresses)]
        spans: list[tuple[int, int | None]] = []
        address = iter(addresses)
        for keys in parts:
            ids, pairs = [], []
            for key in keys:
                words[key.expert] = next(address)
                of_key = pairs_of[key.expert]
                ids += [key.expert] * len(of_key)
                pairs += of_key
            n_pairs = len(pairs)
            padding = [0] * (_even(n_pairs) - n_pairs)
            for column in (ids, pairs, [pair // top_k for pair in pairs]):
                words.extend(column + padding)
            widths += [_even(n_pairs)] * 3
            in_order = pairs == list(range(pairs[0], pairs[0] + n_pairs))
            spans.append((n_pairs, pairs[0] if in_order else None))
        table, *columns = self.exchange.send(words).split(widths)
        table = table[: self.n_experts]
        of_parts = zip(columns[::3], columns[1::3], columns[2::3], spans, strict=True)
        return [Part(table, ids, pairs, tokens, *span) for ids, pairs, tokens, span in of_parts]

    def check(self) -> None:
        """Waits for the device.

        Raises:
            TransferError: a kernel was given an expert that was not there, and computed zeros.
        """
        if int(self.missed):
            raise TransferError("a kernel needed an expert that was in no slot, and computed zeros: please report it")

    def span(self, name: str) -> AbstractContextManager:
        return torch.cuda.nvtx.range(name) if self.device.type == "cuda" else super().span(name)


def _even(n: int) -> int:
    """`n` words of 8 bytes, and one more where the next would not begin at a multiple of 16."""
    return n + n % 2
