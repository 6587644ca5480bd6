"""Hits of a cache policy over recorded routing: the policy's own part of a run, without transfers or prefetches.

Feeds a policy exactly as the runtime does, so a live run without prefetch must report the same hits; replaying one access
at a time instead would flatter recency policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefetch.cache.base import CachePolicy
from prefetch.geometry import ExpertKey


@dataclass(frozen=True, eq=False)
class ReplayCounts:
    """Activations by outcome, one entry per MoE layer up to the last one seen."""

    hits_per_layer: NDArray[np.int64]  # [L]
    misses_per_layer: NDArray[np.int64]  # [L]

    @classmethod
    def from_outcomes(cls, needed: Iterable[ExpertKey], hits: Iterable[ExpertKey]) -> ReplayCounts:
        """Count from every activation of a run, and those among them that hit."""
        n_needed = np.bincount(np.fromiter((key.layer for key in needed), np.int64))
        n_hits = np.bincount(np.fromiter((key.layer for key in hits), np.int64), minlength=len(n_needed))
        return cls(n_hits, n_needed - n_hits)

    @property
    def hits(self) -> int:
        return int(self.hits_per_layer.sum())

    @property
    def misses(self) -> int:
        return int(self.misses_per_layer.sum())

    @property
    def hit_rate(self) -> float:
        """Hits per activation, 0..1; NaN where nothing was needed."""
        activations = self.hits + self.misses
        return self.hits / activations if activations else float("nan")


def replay_hits(policy: CachePolicy, events: Iterable[Sequence[ExpertKey]]) -> ReplayCounts:
    """Run `policy`, from its present state, over routing events.

    Args:
        policy: changed by the replay.
        events: per layer call, the distinct experts it needs, in routing order.

    Returns:
        hits and misses, one per expert of an event.
    """
    needed: list[ExpertKey] = []
    hits: list[ExpertKey] = []
    for event in events:
        in_use = frozenset(event)
        members = [key for key in event if key in policy]
        for key in members:
            policy.access(key)
        for key in event:
            if key not in policy:
                policy.insert(key, in_use)
        needed.extend(event)
        hits.extend(members)
    return ReplayCounts.from_outcomes(needed, hits)
