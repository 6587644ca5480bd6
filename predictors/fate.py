"""Fate: the target's router on this layer's own router input, and only candidates that it is confident of.

Fate (arXiv 2502.12224) and most systems with gate reuse apply router_{N+d} to the input of router N as it is, normalised by layer N;
`gate_reuse` differs by taking the target's norm. Fate then adds to the k best those whose confidence lies above a percentile:

    p = softmax(router_{N+d}(hidden_N))        score(e) = p(e) if e is among the k best, or p(e) > percentile_q(p), else never

Over which numbers the paper takes its 75th percentile was not seen in text; here it is each token's E confidences, so that always
the E / 4 best are candidates. Cost: no parameters; 2 * H * E FLOPs and one partial sort of E numbers a token; no norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from predictors.base import LayerView, ModelView, Prediction, Predictor
from predictors.lookahead import check_lookahead
from prefetch.errors import ConfigError


@dataclass
class Fate(Predictor):
    """Scores are probabilities of the target's router on today's router input, -inf below the threshold."""

    lookahead: int = 1  # layers between the observation and its one target
    # Of a token's confidences, below which an expert beyond the k best is left out; null = none is.
    percentile: float | None = 75.0

    name = "fate"

    def __post_init__(self) -> None:
        if self.percentile is not None and not 0 <= self.percentile <= 100:
            raise ConfigError(f"predictor.percentile={self.percentile}: it must be from 0 to 100, or null for all experts")

    def bind(self, model: ModelView) -> None:
        """Check the distance against the model's depth."""
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers - 1)
        if self.percentile is not None:
            n_below = math.floor(self.percentile / 100 * (model.n_experts - 1)) + 1  # at or below the percentile
            self.n_candidates = max(model.top_k, model.n_experts - n_below)

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Probabilities [T, E] float32 for layer `seen.layer + lookahead`; nothing past the last layer."""
        target = seen.layer + self.lookahead
        if target >= self.model.n_layers:
            return []
        confidence = self.model.router_logits[target](seen.hidden).float().softmax(dim=1)
        if self.percentile is not None:
            best = confidence.topk(self.n_candidates, dim=1)
            confidence = torch.full_like(confidence, -torch.inf).scatter_(1, best.indices, best.values)
        return [Prediction(target, confidence)]
