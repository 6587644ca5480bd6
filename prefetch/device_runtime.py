"""The device-driven runtime: a layer call that never asks the host, so that a decode step can be one CUDA graph.

    predict -> cache_plan -> gather_rows(demand) -> moe_mlp
                    \\-> gather_rows(prefetch), on a stream of its own, until the next layer's call

The books are on the device (`kernels.device_cache`), their rules those of the host's fast tier; what to copy is read there too.
The host-driven runtime (`prefetch.runtime`) moves bytes faster, by the copy engine, and pays a round trip a layer for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.cache_plan import cache_plan
from kernels.device_cache import CachePlan, Counter, DeviceCache
from kernels.gather_rows import gather_rows
from kernels.moe_call import MoECall
from kernels.moe_mlp import moe_mlp
from kernels.slot_table import ExpertTable
from predictors.base import Prediction, Predictor
from predictors.lookahead import layers_ahead
from predictors.none import NoPredictor
from prefetch.errors import ConfigError, TransferError
from prefetch.geometry import MoEGeometry
from prefetch.layer_server import LayerServer

PREFETCH_BYTES = 24_000_000  # 0.7 ms at 35 GB/s; two bf16 experts of Qwen3-30B-A3B, or all its guesses in int4


def asks_host(kind: type[Predictor]) -> bool:
    """Such a predictor cannot drive a device: it computes on the host, or speaks before the router does."""
    return kind.before_attention or not (kind.on_device or issubclass(kind, NoPredictor))


class DeviceRuntime(LayerServer):
    """Serves the MoE layers of one model. `prefetch.model.attach` takes it like the host-driven runtime.

    A call with more (token, expert) pairs than `spare` slots, such as a prefill, reads its experts in place, across the link, and
    leaves the cache alone.

    Args:
        geometry: sizes of the routed part of the model.
        slots: uint8 [capacity + staging + spare, row_bytes], on the device.
        backing: where every expert's row is in pinned host memory, by address; on the device.
        cache: the books over `slots`, empty, with at least one transient slot for each pair of a decode step.
        predictor: one that computes on the device (`on_device`), or none.
        n_guesses: experts to prefetch for each predicted layer; None = the model's top-k, 0 prefetches nothing.
        n_programs: of the copying kernels.
        prefetch_bytes: the most that one layer call prefetches, though always one expert. What a kernel copies cannot be stopped, and the
            next layer's demand loads wait for it.

    Raises:
        ConfigError: the predictor needs the host.
    """

    def __init__(
        self,
        geometry: MoEGeometry,
        slots: Tensor,
        backing: ExpertTable,
        cache: DeviceCache,
        predictor: Predictor,
        *,
        n_guesses: int | None = None,
        n_programs: int = 16,
        prefetch_bytes: int = PREFETCH_BYTES,
    ):
        if asks_host(type(predictor)):
            raise ConfigError(
                f"predictor={predictor.name or type(predictor).__name__} asks the host, and a device-driven run must not: choose one "
                "that computes on the device after the router, such as gate_reuse"
            )
        super().__init__(geometry, predictor, slots.device, slots.device)
        self.cache, self.slots, self.in_place = cache, slots, backing
        self.n_guesses, self.n_programs = geometry.top_k if n_guesses is None else n_guesses, n_programs
        self.most_prefetches = max(1, prefetch_bytes // geometry.expert.row_bytes)
        self.spare = cache.n_slots - cache.capacity - cache.staging
        self.in_slots = type(backing)(backing.geometry, (slots,), cache.slot_of)
        self.missed = torch.zeros(1, dtype=torch.int32, device=slots.device)
        self.prefetching = torch.cuda.Stream(slots.device) if slots.is_cuda else None
        self.prefetched: CachePlan | None = None  # in use on that stream: its memory must not be given to others

    def end_forward(self) -> None:
        """The forward pass is over: all of its work is on the current stream again, as the end of a graph's capture requires."""
        self._await_prefetches()

    def leave(self) -> None:
        """Whoever gets the memory of slots, tables and plans next uses it after the prefetches of a pass that raised."""
        self._await_prefetches()

    def layer_call(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The MoE layer's output [T, H] from the router's input [T, H] and choice [T, k]; enqueued, and nothing waited for."""
        heard = self.heard.pop(layer, None)
        if topk_ids.numel() > self.spare:
            return self._computed(layer, hidden, topk_ids, topk_weights, self.in_place)
        if heard is None:
            heard = self.predictor.predict(self.layer_view(layer, hidden, topk_ids, topk_weights))
        return self.planned_call(layer, hidden, topk_ids, topk_weights, self._guesses(layer, heard))

    def planned_call(
        self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, guesses: Tensor | None
    ) -> Tensor:
        """A call through the cache, given what to prefetch.

        Args:
            guesses: integer [D, M], row d - 1 for layer `layer` + d, likeliest first, -1 for none; None prefetches nothing.
        """
        if guesses is not None and guesses.numel() > self.most_prefetches:
            guesses = self._most_urgent(layer, guesses)
        plan = self._planned(layer, topk_ids, guesses)
        self._await_prefetches()  # they may be for this layer, or their slots may be wanted now
        gather_rows(self.slots, self.in_place.entries, plan, "demand", self.n_programs)
        if guesses is not None:
            self.prefetched = plan
            with self._beside():
                gather_rows(self.slots, self.in_place.entries, plan, "prefetch", self.n_programs)
        return self._computed(layer, hidden, topk_ids, topk_weights, self.in_slots)

    def counts(self) -> dict[str, int]:
        """Experts by what became of them, over all planned calls; waits for the device.

        Raises:
            TransferError: a kernel was given an expert that was not there, and computed zeros.
        """
        if int(self.missed):
            raise TransferError("a kernel needed an expert that was in no slot, and computed zeros: please report it")
        return {counter.name.lower(): int(count) for counter, count in zip(Counter, self.cache.counters.tolist(), strict=True)}

    def _planned(self, layer: int, topk_ids: Tensor, guesses: Tensor | None) -> CachePlan:
        return cache_plan(self.cache, layer, topk_ids, guesses)

    def _computed(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, table: ExpertTable) -> Tensor:
        return moe_mlp(MoECall(hidden, topk_ids, topk_weights, table, layer, *self.forms[layer].parts), missed=self.missed)

    def _guesses(self, layer: int, predictions: list[Prediction]) -> Tensor | None:
        """The likeliest experts of each predicted layer, int64 [D, M]: over several tokens, by their highest score."""
        if not predictions or not self.n_guesses:
            return None
        ahead = {layers_ahead(layer, p.layer, n_layers=self.geometry.n_layers): p for p in predictions}
        nobody = torch.full((self.n_guesses,), -1, dtype=torch.int64, device=self.slots.device)
        best = {d: p.scores.amax(0).topk(self.n_guesses) for d, p in ahead.items()}
        chosen = {d: torch.where(top.values.isneginf(), -1, top.indices) for d, top in best.items()}
        return torch.stack([chosen.get(d, nobody) for d in range(1, max(ahead) + 1)])

    def _most_urgent(self, layer: int, guesses: Tensor) -> Tensor:
        """`guesses` but for those on board and, beyond the first `most_prefetches` others, all."""
        n_layers, n_experts = self.cache.slot_of.shape
        slot_of = torch.stack([self.cache.slot_of[(layer + d) % n_layers] for d in range(1, len(guesses) + 1)])
        on_board = slot_of.gather(1, guesses.clamp(0, n_experts - 1).long()) >= 0
        absent = guesses.masked_fill(on_board, -1)
        before = (absent >= 0).view(-1).cumsum(0).view(absent.shape)  # and itself, nearest layer and likeliest first
        return absent.masked_fill(before > self.most_prefetches, -1)

    def _await_prefetches(self) -> None:
        """Those of this forward pass: while a graph is captured, its streams may wait for nothing from before."""
        if self.prefetching is not None and self.prefetched is not None:
            torch.cuda.current_stream(self.slots.device).wait_stream(self.prefetching)
        self.prefetched = None

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the prefetches' stream, after everything enqueued so far: the slots' last readers among it."""
        if self.prefetching is None:
            yield
            return
        self.prefetching.wait_stream(torch.cuda.current_stream(self.slots.device))
        with torch.cuda.stream(self.prefetching):
            yield
