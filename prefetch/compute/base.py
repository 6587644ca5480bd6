"""Who computes experts: what the runtime asks of the CPU path and of the kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.expert_form import PLAIN, ExpertForm
from prefetch.dispatch import Dispatch
from prefetch.geometry import ExpertKey


class LayerCompute(ABC):
    """The expert part of one layer call, computed in parts as experts become available.

    The result has the same bits whatever the parts were: every pair's own work is done alike in each, and a token's experts are
    summed in routing order at the end.
    """

    @abstractmethod
    def from_slots(self, keys: Sequence[ExpertKey], slots: Sequence[int]) -> None:
        """Compute `keys`, complete in `slots`. The slots may be released when this returns."""

    @abstractmethod
    def in_place(self, key: ExpertKey, read: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Compute `key`, which has no slot, where it lies. `read` brings its gate_up [2I, H] and down [H, I] from the backing tier to
        the CPU; who can do without does not call it."""

    @abstractmethod
    def finish(self) -> Tensor:
        """The layer's output [T, H], once every needed expert has been computed."""


class ExpertCompute(ABC):
    """Computes the layer calls of one run.

    Attributes:
        device: where hidden states and results are.
    """

    device: torch.device

    @abstractmethod
    def begin(
        self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, work: Dispatch, form: ExpertForm = PLAIN
    ) -> LayerCompute:
        """A layer call begins. `hidden` [T, H], `topk_ids` and `topk_weights` [T, k] on `device`, as `form` is; `work` is the same on
        the host."""

    def enter(self, name: str) -> None:
        """A named span of the timeline begins, for profilers."""

    def leave(self) -> None:
        """The span entered last ends."""
