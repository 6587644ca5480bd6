"""Token experts: the experts that this very token id has used before, at the coming layers.

Routing in shallow layers follows the token itself more than its context. Counts are kept per token id and layer, for the ids met
first, and a token without counts falls back to popularity, as do experts it has not used. It learns online and keeps its counts.
Cost: (`max_tokens` + 1) L E counters; k additions a token and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from predictors.base import LayerView, ModelView, Prediction, Predictor
from predictors.lookahead import check_lookahead
from prefetch.errors import ConfigError


@dataclass
class TokenExperts(Predictor):
    """Scores are counts of the token's own experts; below 1, the share of all tokens that used the expert."""

    lookahead: int = 1  # predicts this many coming layers of this forward pass, nearest first
    max_tokens: int = 4096  # token ids that are counted apart

    name = "token_experts"

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"predictor.max_tokens={self.max_tokens}: it must be at least 1")

    def bind(self, model: ModelView) -> None:
        """Start counting afresh."""
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers - 1)
        self.row_of: dict[int, int] = {}
        self.counts = torch.zeros(0, model.n_layers, model.n_experts)
        self.popularity = torch.zeros(model.n_layers, model.n_experts)

    @torch.inference_mode()
    def predict(self, seen: LayerView) -> list[Prediction]:
        """Count this layer's routing, then [T, E] for the next `lookahead` layers; nothing past the last layer."""
        rows = self._rows(seen.token_ids)
        self._count(seen.layer, rows, seen.topk_ids)
        last = min(seen.layer + self.lookahead, self.model.n_layers - 1)
        return [Prediction(target, self._scores(target, rows)) for target in range(seen.layer + 1, last + 1)]

    def _rows(self, token_ids: Tensor) -> Tensor:
        """int64 [T], the row of each token id, -1 where there is no room for one."""
        found = []
        for token in token_ids.tolist():
            if token not in self.row_of and len(self.row_of) < self.max_tokens:
                self.row_of[token] = len(self.row_of)
            found.append(self.row_of.get(token, -1))
        if len(self.row_of) > len(self.counts):
            room = min(max(2 * len(self.counts), len(self.row_of)), self.max_tokens) - len(self.counts)
            self.counts = torch.cat([self.counts, self.counts.new_zeros(room, *self.counts.shape[1:])])
        return torch.tensor(found)

    def _count(self, layer: int, rows: Tensor, ids: Tensor) -> None:
        self.popularity[layer].scatter_add_(0, ids.reshape(-1), torch.ones(ids.numel()))
        known = rows >= 0
        places = rows[known, None].expand(-1, ids.shape[1]), ids[known]
        self.counts[:, layer].index_put_(places, torch.ones(()), accumulate=True)

    def _scores(self, target: int, rows: Tensor) -> Tensor:
        popularity = self.popularity[target]
        share = popularity / (popularity.sum() + 1)
        own = self.counts[rows.clamp_min(0), target] if len(self.counts) else share.new_zeros(len(rows), len(share))
        return torch.where(rows[:, None] >= 0, own, 0.0) + share
