"""A device-driven run with its records: the same tables as the host-driven runtime leaves, but for what only a host's clock could see.

While a forward pass runs, references to the device's own tensors are noted and nothing is asked; when it has ended they come to the
host. Which experts were copied is read off the plans; what became of each prefetch follows from the rule that it leaves when its layer
routes without it; and both must agree with the counters that the planner keeps. Times of layer calls and copies are not known.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kernels.device_cache import CachePlan
from predictors.base import Prediction
from predictors.lookahead import layers_ahead
from prefetch.device_runtime import DeviceRuntime
from prefetch.errors import TransferError
from prefetch.fast_tier import TransferRecord
from prefetch.geometry import ExpertKey
from prefetch.recorder import CallTimer, Recorder, RunRecord
from prefetch.transfers.base import Transfer, TransferState

NOT_KNOWN = CallTimer(math.nan, math.nan, math.nan, math.nan)


@dataclass
class Noted:
    """One layer call, in the device's tensors until they are fetched."""

    layer: int
    topk_ids: Tensor
    topk_weights: Tensor
    predictions: list[Prediction] = field(default_factory=list)
    slots: list[Tensor] = field(default_factory=list)  # int32 [E] each: which slots held the predicted layer's experts then
    copies: list[Tensor] = field(
        default_factory=list
    )  # the plan's keys, slots and bounds; none where experts were read in place


class KernelCopy(Transfer):
    """One expert that a kernel has copied. When is not known."""

    state = TransferState.DONE
    submitted_s = started_s = finished_s = 0.0
    error = None
    demand = False

    def __init__(self, key: ExpertKey, slot: int, n_bytes: int, demand: bool):
        self.key, self.slot, self.n_bytes, self.demand = key, slot, n_bytes, demand

    @property
    def moved_bytes(self) -> int:
        return self.n_bytes


class RecordedDeviceRuntime(DeviceRuntime):
    """A `DeviceRuntime` that keeps records, and so waits for the device at the end of each forward pass. Not to be captured."""

    def __init__(self, *arguments: Any, **knobs: Any):
        super().__init__(*arguments, **knobs)
        self.recorder = Recorder(self.geometry)
        self.copies: list[TransferRecord] = []
        self.staged: dict[ExpertKey, TransferRecord] = {}
        self._noted: list[Noted] = []

    def begin_forward(self, token_ids: Tensor, *, new_sequence: bool) -> None:
        super().begin_forward(token_ids, new_sequence=new_sequence)
        self._noted.clear()  # of a pass that raised
        self.recorder.begin_forward(self.sequence, self.step, token_ids.cpu())

    def end_forward(self) -> None:
        """The forward pass is over, on the device too."""
        super().end_forward()
        if self.slots.is_cuda:
            torch.cuda.synchronize(self.slots.device)
        self.recorder.end_forward()
        for noted in _on_host(self._noted):
            self._record_call(noted)
        self._noted.clear()

    def layer_call(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        self._noted.append(Noted(layer, topk_ids, topk_weights))
        return super().layer_call(layer, hidden, topk_ids, topk_weights)

    def finish(self) -> None:
        """The run is over: what is still staged was for nobody.

        Raises:
            TransferError: the device counted other than the copies tell, or a kernel computed without an expert.
        """
        counted, outcomes = self.counts(), Counter(record.outcome for record in self.copies)
        told = {
            "misses": outcomes["demand"],
            "useful": outcomes["useful"],
            "wasted": outcomes["wasted"],
            "prefetches": outcomes["useful"] + outcomes["wasted"] + len(self.staged),
        }
        for record in self.staged.values():
            record.outcome = "wasted"
        self.staged.clear()
        wrong = {name: (counted[name], n) for name, n in told.items() if counted[name] != n}
        if wrong:
            raise TransferError(f"the device's books do not balance: (counted, copied) = {wrong}: please report it")

    def record(self) -> RunRecord:
        """The run's tables, once it has finished."""
        return self.recorder.record(self.copies)

    def _guesses(self, layer: int, predictions: list[Prediction]) -> Tensor | None:
        noted = self._noted[-1]
        noted.predictions, noted.slots = predictions, [self.cache.slot_of[guess.layer].clone() for guess in predictions]
        return super()._guesses(layer, predictions)

    def _planned(self, layer: int, topk_ids: Tensor, guesses: Tensor | None) -> CachePlan:
        plan = super()._planned(layer, topk_ids, guesses)
        self._noted[-1].copies = [plan.copy_keys, plan.copy_slots, plan.copy_bounds]
        return plan

    def _record_call(self, noted: Noted) -> None:
        """A layer call whose tensors have come to the host, in the order of calls."""
        layer = noted.layer
        self.recorder.routed(noted.topk_ids, noted.topk_weights)
        for guess, slots in zip(noted.predictions, noted.slots, strict=True):
            self.recorder.guessed(guess, self._ahead(layer, guess.layer), slots.numpy().tobytes())
        needed = set(noted.topk_ids.flatten().tolist())
        if noted.copies:
            n_misses = self._record_copies(layer, needed, *noted.copies)
            counts = len(needed), len(needed) - n_misses, 0, n_misses, 0
        else:
            counts = len(needed), 0, 0, len(needed), len(needed)
        self.recorder.called(layer, len(noted.topk_ids), counts, NOT_KNOWN, math.nan)

    def _record_copies(self, layer: int, needed: set[int], copy_keys: Tensor, copy_slots: Tensor, bounds: Tensor) -> int:
        """What the plan copied, and what that says of earlier prefetches for this layer; the number of demand loads."""
        for key in [key for key in self.staged if key.layer == layer]:
            self.staged.pop(key).outcome = "useful" if key.expert in needed else "wasted"
        _, n_misses, n_copies = bounds.tolist()
        keys, slots = copy_keys[:n_copies].tolist(), copy_slots[:n_copies].tolist()
        for place, (code, slot) in enumerate(zip(keys, slots, strict=True)):
            key, demand = ExpertKey(*divmod(code, self.geometry.n_experts)), place < n_misses
            copy = KernelCopy(key, slot, self.geometry.expert.row_bytes, demand)
            ahead = 0 if demand else self._ahead(layer, key.layer)
            kind, outcome = ("demand", "demand") if demand else ("prefetch", "")
            self.copies.append(TransferRecord(copy, kind, self.sequence, self.step, ahead, outcome))
            if not demand:
                self.staged[key] = self.copies[-1]
        return int(n_misses)

    def _ahead(self, layer: int, target: int) -> int:
        return layers_ahead(layer, target, n_layers=self.geometry.n_layers)


def _on_host(calls: Sequence[Noted]) -> list[Noted]:
    """The same calls in tensors on the host."""
    tensors = [tensor for call in calls for tensor in _tensors(call)]
    fetched = iter(_fetched(tensors))
    found = []
    for call in calls:
        ids, weights = next(fetched), next(fetched)
        predictions = [replace(guess, scores=next(fetched)) for guess in call.predictions]
        slots = [next(fetched) for _ in call.slots]
        copies = [next(fetched) for _ in call.copies]
        found.append(Noted(call.layer, ids, weights, predictions, slots, copies))
    return found


def _tensors(call: Noted) -> list[Tensor]:
    return [call.topk_ids, call.topk_weights, *(guess.scores for guess in call.predictions), *call.slots, *call.copies]


def _fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the host, one transfer for all of a shape and dtype: layers have the same."""
    alike: dict[tuple, list[int]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        alike[tensor.shape, tensor.dtype].append(place)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        found.update(zip(places, torch.stack([tensors[place] for place in places]).cpu(), strict=True))
    return [found[place] for place in range(len(tensors))]
