"""Popularity: the experts each layer has used most, whatever the token. The baseline every published predictor reports.

It learns online, from nothing but the routing it has seen, and keeps its counts across sequences.
Cost: L * E counters; k additions a token and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from predictors.base import LayerView, ModelView, Prediction, Predictor
from predictors.lookahead import check_lookahead, coming_layers
from prefetch.errors import ConfigError


@dataclass
class Popularity(Predictor):
    """Scores are running counts of routed tokens per expert; a layer that has not been seen yet gets no prediction."""

    lookahead: int = 1  # predicts this many coming layers, nearest first, into the next forward pass
    decay: float = 1.0  # what a count is worth one token later; below 1, old tokens fade

    name = "popularity"
    reads_states = False

    def __post_init__(self) -> None:
        if not 0.0 < self.decay <= 1.0:
            raise ConfigError(f"predictor.decay={self.decay}: it must be above 0 and at most 1 (1 = never forget)")

    def bind(self, model: ModelView) -> None:
        """Start counting afresh."""
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers)
        # [1, E] each. Replaced, not changed: records keep them.
        self.counts: list[Tensor | None] = [None] * model.n_layers
        self.one_each = torch.ones(1, model.top_k)  # made once: this runs in every layer call

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Count this layer's routing, then rank coming layers by their counts: [1, E] each."""
        self._count(seen.layer, seen.topk_ids)
        targets = coming_layers(seen.layer, self.lookahead, self.model.n_layers)
        return [Prediction(t, counts) for t in targets if (counts := self.counts[t]) is not None]

    def _count(self, layer: int, topk_ids: Tensor) -> None:
        n_tokens, top_k = topk_ids.shape
        counts = self.counts[layer]
        if counts is None:
            counts = torch.zeros(1, self.model.n_experts, device=topk_ids.device)
        if self.decay < 1.0:
            counts = counts * self.decay**n_tokens
        if n_tokens == 1:
            self.counts[layer] = counts.scatter_add(1, topk_ids, self.one_each.to(counts.device))
            return
        if self.decay == 1.0:
            worth = counts.new_ones(1, n_tokens * top_k)
        else:
            age = torch.arange(n_tokens - 1, -1, -1, device=topk_ids.device)
            worth = (self.decay**age).repeat_interleave(top_k).unsqueeze(0)
        self.counts[layer] = counts.scatter_add(1, topk_ids.reshape(1, -1), worth)
