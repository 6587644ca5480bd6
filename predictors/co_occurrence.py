"""Co-occurrence: the experts that have followed this layer's experts, layer to layer within a token.

With n(e, e') the tokens so far that used e at layer N and e' at layer N + d, Laplace's prior a, and the k experts S that this token
uses at layer N taken as independent hints (naive Bayes; ST-MoE, arXiv 2606.15453, keeps such a table in 2-bit counters):

    P(e' | e) = k (n(e, e') + a) / sum_j (n(e, j) + a)        P(e') = k sum_e (n(e, e') + a) / sum_e,j (n(e, j) + a)
    score(e') = log P(e') + sum over e in S of log (P(e' | e) / P(e')), less what is the same for all e':
              = sum over e in S of log (n(e, e') + a) - (k - 1) log sum_e (n(e, e') + a)

It learns online, from nothing but the routing it has seen, and keeps its counts across sequences. Cost: (L - d) * E * E counters;
2 * E * E additions a call, (k + 1) * E logarithms a token to predict and k * k additions to learn.
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
    """Scores are log-probabilities, up to a constant per token; a layer that has not been seen yet gets no prediction."""

    lookahead: int = 1  # layers between the observation and its one target
    prior: float = 0.5  # tokens that every pair of experts is taken to have been seen in already
    decay: float = 1.0  # what a count is worth one token later; below 1, old tokens fade

    name = "co_occurrence"
    reads_states = False

    def __post_init__(self) -> None:
        if not self.prior > 0:
            raise ConfigError(f"predictor.prior={self.prior}: it must be above 0, or pairs never seen have no probability")
        if not 0.0 < self.decay <= 1.0:
            raise ConfigError(f"predictor.decay={self.decay}: it must be above 0 and at most 1 (1 = never forget)")

    def bind(self, model: ModelView) -> None:
        """Start counting afresh."""
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers - 1)
        n_experts = model.n_experts
        self.counts = torch.zeros(model.n_layers, n_experts, n_experts)  # [target layer, at the observing one, at the target]
        self.has_counts = [False] * model.n_layers
        self.used: dict[int, Tensor] = {}  # layer -> what it selected in this forward pass, [T, k]

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Learn what led to this layer's experts, then score those of layer `seen.layer + lookahead`: [T, E]."""
        topk_ids = self.used[seen.layer] = seen.topk_ids.cpu()
        source, target = seen.layer - self.lookahead, seen.layer + self.lookahead
        if source >= 0:
            self._learn(seen.layer, self.used[source], topk_ids)
        if target >= self.model.n_layers or not self.has_counts[target]:
            return []
        return [Prediction(target, self._scores(target, topk_ids).to(seen.topk_ids.device))]

    def _scores(self, target: int, before: Tensor) -> Tensor:
        """[T, E] from what the tokens used at the observing layer, [T, k]."""
        counts = self.counts[target] + self.prior
        joint = counts[before].log().sum(dim=1)
        return joint.sub_(counts.sum(dim=0).log(), alpha=self.model.top_k - 1)

    def _learn(self, target: int, before: Tensor, now: Tensor) -> None:
        """Count the pairs of `before` [T, k] and `now` [T, k] of the same tokens, the last of which is worth 1."""
        n_tokens, top_k = now.shape
        counts = self.counts[target]
        self.has_counts[target] = True
        pairs = (before.unsqueeze(2) * self.model.n_experts + now.unsqueeze(1)).view(-1)  # [T * k * k]
        worth = torch.ones(len(pairs))
        if self.decay < 1.0:
            counts *= self.decay**n_tokens
            worth = (self.decay ** torch.arange(n_tokens - 1, -1, -1)).repeat_interleave(top_k * top_k)
        counts.view(-1).scatter_add_(0, pairs, worth)
