"""Roofline: with few tokens a layer takes as long as its weights take to read. An estimate from rates, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.machines.base import Machine, at_least
from prefetch.costs import Costs
from prefetch.errors import ConfigError
from prefetch.geometry import MoEGeometry


@dataclass
class Roofline(Machine):
    """Every weight is read once a forward pass at the fast tier's bandwidth; launches come on top."""

    link: Any  # {bytes_per_s, latency_s, chunk_bytes}
    memory_bytes_per_s: float  # of the fast tier, as kernels reach it
    call_s: float = 0.0  # launches and books of one MoE layer call
    load_s: float = 0.0  # launches and books of one expert that is waited for
    predictor_s: float = 0.0  # predictor and planner at one layer
    in_place_bytes_per_s: float | None = None  # at which the CPU computes an expert where it lies; null: not known

    def __post_init__(self) -> None:
        for option in ("call_s", "load_s", "predictor_s"):
            at_least(option, getattr(self, option), 0)
        at_least("memory_bytes_per_s", self.memory_bytes_per_s, 1)
        if self.in_place_bytes_per_s is not None:
            at_least("in_place_bytes_per_s", self.in_place_bytes_per_s, 1)

    def costs(self, geometry: MoEGeometry, dense_bytes: float | None, arm: str | None) -> Costs:
        """The same for every arm; `predictor_s` is charged to those that predict."""
        if dense_bytes is None:
            raise ConfigError(
                "this machine reckons a layer's time from its bytes: set shape.dense_bytes, what a forward pass reads beside the routed "
                "experts, per MoE layer; or choose machine=measured"
            )
        expert_bytes, in_place = geometry.expert.row_bytes, self.in_place_bytes_per_s
        return Costs(
            dense_s=dense_bytes / self.memory_bytes_per_s,
            call_s=self.call_s,
            expert_s=expert_bytes / self.memory_bytes_per_s,
            load_s=self.load_s,
            predictor_s=self.predictor_s,
            in_place_s=None if in_place is None else expert_bytes / in_place,
        )
