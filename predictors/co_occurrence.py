"""Co-occurrence: which experts of a coming layer went with the experts of this one, counted over past tokens.

P(e' at layer N + d | e at layer N) is estimated from counts with Laplace smoothing, and averaged over the token's k experts; the
layer-to-layer statistics of several offloading engines work so. It learns online, from routing alone, and keeps its counts.
Cost: (L - d) E^2 counters; k^2 additions and k E more a token and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from predictors.base import LayerView, ModelView, Prediction, Predictor
from predictors.lookahead import check_lookahead
from prefetch.errors import ConfigError


@dataclass
class CoOccurrence(Predictor):
    """Scores are probabilities per expert, the mean over what this layer selected."""

    lookahead: int = 1  # layers between the observation and its one target
    smoothing: float = 1.0  # counts that every pair starts with

    name = "co_occurrence"

    def __post_init__(self) -> None:
        if not self.smoothing > 0:
            raise ConfigError(f"predictor.smoothing={self.smoothing}: it must be above 0")

    def bind(self, model: ModelView) -> None:
        """Start counting afresh."""
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers - 1)
        # [E of layer n, E of layer n + lookahead]
        self.counts = [torch.zeros(model.n_experts, model.n_experts) for _ in range(model.n_layers - self.lookahead)]
        self.selected: dict[int, Tensor] = {}  # layer of this forward pass -> ids [T, k]

    @torch.inference_mode()
    def predict(self, seen: LayerView) -> list[Prediction]:
        """Count this layer's experts with those `lookahead` before, then [T, E] for layer `seen.layer + lookahead`."""
        if seen.layer == 0:
            self.selected.clear()
        self.selected[seen.layer] = seen.topk_ids
        source = seen.layer - self.lookahead
        if source >= 0:
            self._count(source, self.selected.pop(source), seen.topk_ids)
        target = seen.layer + self.lookahead
        if target >= self.model.n_layers:
            return []
        counts = self.counts[seen.layer] + self.smoothing
        conditional = counts / counts.sum(1, keepdim=True)
        return [Prediction(target, conditional[seen.topk_ids].mean(1))]

    def _count(self, source: int, before: Tensor, after: Tensor) -> None:
        pairs = before[:, :, None] * self.model.n_experts + after[:, None, :]  # [T, k, k]
        self.counts[source].view(-1).scatter_add_(0, pairs.reshape(-1), torch.ones(pairs.numel()))
