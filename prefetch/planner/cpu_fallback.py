"""CPU fallback: compute a missing expert where it lies instead of waiting for its transfer.

Few tokens make an expert's arithmetic cheaper than moving its weights (Fiddler, arXiv 2402.07033; HybriMoE, arXiv
2504.05897). An expert that the CPU computes does not enter the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from predictors.base import Prediction
from prefetch.errors import ConfigError
from prefetch.geometry import ExpertKey, MoEGeometry
from prefetch.planner.base import FastTierView, Planner


@dataclass
class CpuFallback(Planner):
    """Sends missing experts over the link while its queue is short, the rest to the CPU; prefetches as `prefetch`."""

    prefetch: Planner  # the planner that chooses prefetches
    link_experts: int = 0  # queue length from which the CPU takes over; 0 = the CPU computes every miss

    def __post_init__(self) -> None:
        if self.link_experts < 0:
            raise ConfigError(f"planner.link_experts={self.link_experts}: it must be at least 0")

    def bind(self, geometry: MoEGeometry) -> None:
        """Bind both planners."""
        super().bind(geometry)
        self.prefetch.bind(geometry)

    def plan(self, predictions: Sequence[Prediction], tier: FastTierView) -> list[ExpertKey]:
        """What `prefetch` plans."""
        return self.prefetch.plan(predictions, tier)

    def leave_in_place(self, missing: Sequence[ExpertKey], tier: FastTierView) -> list[ExpertKey]:
        """The `missing` experts, in routing order, that find no place in a queue of `link_experts`."""
        row_bytes = self.geometry.expert.row_bytes
        n_by_link = max(0, (self.link_experts * row_bytes - tier.queued_bytes) // row_bytes)
        return list(missing[n_by_link:])
