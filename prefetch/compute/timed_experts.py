"""Experts that are not computed: a replay only lets the time pass that computing them takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from prefetch.clock import VirtualClock
from prefetch.compute.base import ExpertCompute, LayerCompute, Routed
from prefetch.costs import Costs
from prefetch.errors import ConfigError
from prefetch.geometry import ExpertKey


class TimedLayer(LayerCompute):
    """One layer call. Its output is its input."""

    def __init__(self, clock: VirtualClock, costs: Costs, hidden: Tensor):
        self.clock, self.costs, self.hidden = clock, costs, hidden
        self.expert_s = costs.expert_s  # of the next one

    def expect(self, keys: Sequence[ExpertKey], slots: Sequence[int]) -> None:
        """All that are computed from now on have been waited for."""
        self.expert_s = self.costs.expert_s + self.costs.load_s

    def from_slots(self, keys: Sequence[ExpertKey], slots: Sequence[int]) -> None:
        self.clock.advance(len(keys) * self.expert_s)

    def in_place(self, keys: Sequence[ExpertKey], read: Callable[[ExpertKey], tuple[Tensor, Tensor]]) -> None:
        """`read` is not called: what it would take is part of `in_place_s`.

        Raises:
            ConfigError: nobody said what an expert takes there.
        """
        if self.costs.in_place_s is None:
            raise ConfigError(
                "the planner leaves experts to the CPU, but nobody knows how fast that is on this machine: choose planner=top_m, or a machine "
                "from data sheets, with machine.in_place_bytes_per_s"
            )
        self.clock.advance(len(keys) * self.costs.in_place_s)

    def finish(self) -> Tensor:
        return self.hidden


class TimedExperts(ExpertCompute):
    """Computes nothing, in `costs` of `clock`'s time."""

    device = torch.device("cpu")

    def __init__(self, clock: VirtualClock, costs: Costs):
        self.clock, self.costs = clock, costs

    def span(self, name: str) -> AbstractContextManager:
        """A layer call begins: its own time passes before anything is looked up or asked for, as most of it does live."""
        self.clock.advance(self.costs.call_s)
        return super().span(name)

    def begin(self, layer: int, routed: Routed, in_place: Sequence[ExpertKey]) -> LayerCompute:
        return TimedLayer(self.clock, self.costs, routed.hidden)
