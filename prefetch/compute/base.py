"""Who computes experts: what the runtime asks of the CPU path and of the kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.expert_form import PLAIN, ExpertForm
from prefetch.dispatch import Dispatch
from prefetch.geometry import ExpertKey

NO_SPAN = nullcontext()


class Routed(NamedTuple):
    """What one layer call has to compute. T tokens, k experts each."""

    hidden: Tensor  # [T, H]; this and the next two are on the device that computes
    ids: Tensor  # [T, k]
    weights: Tensor  # [T, k]
    weights_on_host: Tensor  # [T, k]
    work: Dispatch  # the ids on the host, by expert
    form: ExpertForm = PLAIN  # of the layer's experts, on the device that computes


class LayerCompute(ABC):
    """The expert part of one layer call, computed in parts as experts become available.

    The result has the same bits whatever the parts were: every pair's own work is done alike in each, and a token's experts are
    summed in one fixed order at the end.
    """

    def expect(self, keys: Sequence[ExpertKey], slots: Sequence[int]) -> None:
        """`keys` are on their way into `slots`, and each will be computed by itself when it is there: prepare what can be."""

    @abstractmethod
    def from_slots(self, keys: Sequence[ExpertKey], slots: Sequence[int]) -> None:
        """Compute `keys`, complete in `slots`. The slots may be released when this returns."""

    @abstractmethod
    def in_place(self, keys: Sequence[ExpertKey], read: Callable[[ExpertKey], tuple[Tensor, Tensor]]) -> None:
        """Compute `keys`, which have no slots, where they lie. `read` brings an expert's gate_up [2I, H] and down [H, I] from the backing
        tier to the CPU; who can do without does not call it."""

    @abstractmethod
    def finish(self) -> Tensor:
        """The layer's output [T, H], once every needed expert has been computed."""


class ExpertCompute(ABC):
    """Computes the layer calls of one run.

    Attributes:
        device: where hidden states and results are.
        enqueues: work goes on there while the host goes on: the host asks once a layer for all that it wants to know.
    """

    device: torch.device
    enqueues = False

    @abstractmethod
    def begin(self, layer: int, routed: Routed, in_place: Sequence[ExpertKey]) -> LayerCompute:
        """A layer call begins, in which `in_place` will be computed where they lie."""

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`tensors` on the host, complete."""
        return [tensor.cpu() for tensor in tensors]

    def wait(self) -> None:
        """Until all that was enqueued is done."""

    def span(self, name: str) -> AbstractContextManager:
        """A named span of the timeline, for profilers."""
        return NO_SPAN
