"""Top-m: prefetch the m likeliest experts of each predicted layer, nearest first, as far as slots and link allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from predictors.base import Prediction, stable_top
from prefetch.errors import ConfigError
from prefetch.geometry import ExpertKey, MoEGeometry
from prefetch.planner.base import FastTierView, Planner

CONSIDERED_ONE_IN = 11  # plans, while holding back; a prime, so that every layer gets its turn


@dataclass
class TopM(Planner):
    """Ranks by score alone. Queued demand loads overtake prefetches anyway; `max_queued_experts` also keeps the link's
    queue short, so that later and better predictions find it free."""

    m: int | None = None  # experts per token and target layer; None = the model's top-k
    extra: int = 0  # on top of m, as insurance against near misses
    max_queued_experts: int | None = None  # the longest queue to plan for; None = bounded by free slots only
    min_useful_share: float = 0.4  # below this share of useful prefetches they are only considered, not made

    def __post_init__(self) -> None:
        for option, lowest in (("m", 1), ("extra", 0), ("max_queued_experts", 1)):
            value = getattr(self, option)
            if value is not None and value < lowest:
                raise ConfigError(f"planner.{option}={value}: it must be at least {lowest}")
        if not 0 <= self.min_useful_share <= 1:
            raise ConfigError(f"planner.min_useful_share={self.min_useful_share}: it must be a share, from 0 to 1")

    def bind(self, geometry: MoEGeometry) -> None:
        """Resolve `m` against the model."""
        super().bind(geometry)
        self.n_held_back = 0
        self.keys = [[ExpertKey(layer, e) for e in range(geometry.n_experts)] for layer in range(geometry.n_layers)]
        m = geometry.top_k if self.m is None else self.m
        self.n_wanted = min(m + self.extra, geometry.n_experts)

    def plan(self, predictions: Sequence[Prediction], tier: FastTierView) -> list[ExpertKey]:
        """The wanted experts that are not on board, in the order of `predictions`, then likeliest first.

        A wrong prefetch costs the link, the fast tier and this thread. While guesses mostly miss, only one plan in some is made,
        and not carried out: the fast tier notes how it would have done, so that a predictor which gets better is noticed.
        """
        if tier.useful_share >= self.min_useful_share:
            return self._choose(predictions, tier)
        if self.n_held_back % CONSIDERED_ONE_IN == 0:
            for key in self._choose(predictions, tier):
                tier.consider(key)
        self.n_held_back += 1
        return []

    def _choose(self, predictions: Sequence[Prediction], tier: FastTierView) -> list[ExpertKey]:
        room = self._room(tier)
        chosen: dict[ExpertKey, None] = {}
        for prediction in predictions:
            if len(chosen) >= room:
                break
            keys = self.keys[prediction.layer]
            for expert in likeliest(prediction.scores, self.n_wanted):
                key = keys[expert]
                if not tier.on_board(key):
                    chosen[key] = None
        return list(chosen)[:room]

    def _room(self, tier: FastTierView) -> int:
        if self.max_queued_experts is None:
            return max(0, tier.free_slots)
        row_bytes = self.geometry.expert.row_bytes
        idle = (self.max_queued_experts * row_bytes - tier.queued_bytes) // row_bytes
        return max(0, min(tier.free_slots, idle))


def likeliest(scores: Tensor, m: int) -> list[int]:
    """Experts among the `m` highest of at least one row of `scores` [T, E], likeliest first; -inf is never chosen.

    Rows vote: the expert that most rows want comes first, then the higher score, then the lower id. With one row that
    is plain top-m.
    """
    if len(scores) == 1:
        row = scores[0].tolist()
        ranked = sorted(range(len(row)), key=row.__getitem__, reverse=True)  # of equals, the lower id stays first
        return [expert for expert in ranked[:m] if row[expert] != -torch.inf]
    top = stable_top(scores, m)
    wanted = top[scores.gather(1, top) != -torch.inf]
    votes = torch.bincount(wanted, minlength=scores.shape[1]).tolist()
    best = scores.amax(0).tolist()
    return sorted((e for e, n in enumerate(votes) if n), key=lambda e: (-votes[e], -best[e], e))
