"""Token id: the experts that each layer has used for this very token before, backed off to those it uses at all.

With n_l(x, e) the occurrences of token x that used expert e at layer l, n_l(x) all of them, and P_l(e) the share of all tokens so
far that used e (the predictor by token id that ProMoE, arXiv 2410.22134, compares with; the back-off is Dirichlet smoothing):

    score(e) = (n_l(x, e) + m P_l(e)) / (n_l(x) + m)

The token is known before the first layer, so that all layers of the forward pass can be predicted at once, and far ahead as well as
near. It learns online and keeps its counts across sequences. Cost: (number of different tokens seen + 1) * L * (E + 1) counters; k
additions a token and layer to learn, 2 * E a token and target to predict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from predictors.base import LayerView, ModelView, Prediction, Predictor
from predictors.lookahead import check_lookahead
from prefetch.errors import ConfigError


@dataclass
class TokenId(Predictor):
    """Scores are smoothed frequencies of use; a layer that has not been seen yet gets no prediction."""

    lookahead: int = 1  # predicts this many coming layers of the same forward pass, nearest first
    prior: float = 4.0  # m: occurrences at which a token's own experts weigh as much as those of all tokens

    name = "token_id"
    reads_states = False

    def __post_init__(self) -> None:
        if not self.prior > 0:
            raise ConfigError(f"predictor.prior={self.prior}: it must be above 0, or a token never seen has no scores")

    def bind(self, model: ModelView) -> None:
        """Start counting afresh."""
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers - 1)
        self.row_of = torch.full((0,), -1, dtype=torch.int64)  # token id -> its row in `used`, -1 before it is first seen
        self.n_rows = 0
        self.used = torch.zeros(0, model.n_layers, model.n_experts)  # [row, L, E]; grows by doubling
        self.occurred = torch.zeros(0, model.n_layers)  # [row, L]
        self.used_by_all = torch.zeros(model.n_layers, model.n_experts)
        self.occurred_of_all = [0] * model.n_layers

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Count this layer's routing, then score coming layers for the same tokens: [T, E] each."""
        if seen.layer == 0:
            self.rows = self._rows(seen.token_ids.cpu())
        self._count(seen.layer, seen.topk_ids.cpu())
        first, end = seen.layer + 1, min(seen.layer + 1 + self.lookahead, self.model.n_layers)
        return [Prediction(t, self._scores(t).to(seen.hidden.device)) for t in range(first, end) if self.occurred_of_all[t] > 0]

    def _scores(self, layer: int) -> Tensor:
        popularity = self.used_by_all[layer] / self.occurred_of_all[layer]
        own, occurred = self.used[self.rows, layer], self.occurred[self.rows, layer].unsqueeze(1)
        return (own + self.prior * popularity) / (occurred + self.prior)

    def _count(self, layer: int, topk_ids: Tensor) -> None:
        n_layers, n_experts = self.used_by_all.shape
        n_tokens, experts = len(topk_ids), topk_ids.reshape(-1)
        places = self.rows * n_layers + layer  # in [row, L]
        one = torch.ones(len(experts))
        self.occurred.view(-1).scatter_add_(0, places, one[:n_tokens])
        self.used.view(-1).scatter_add_(0, (places.unsqueeze(1) * n_experts + topk_ids).reshape(-1), one)
        self.used_by_all[layer].scatter_add_(0, experts, one)
        self.occurred_of_all[layer] += n_tokens

    @torch.inference_mode(False)  # what is kept is written to later, perhaps outside this mode, which would be refused
    def _rows(self, token_ids: Tensor) -> Tensor:
        """The rows [T] of `token_ids` [T]; those seen for the first time get new ones."""
        largest = int(token_ids.max())
        if largest >= len(self.row_of):
            self.row_of = torch.nn.functional.pad(self.row_of, (0, largest + 1 - len(self.row_of)), value=-1)
        rows = self.row_of[token_ids]
        if bool((rows < 0).any()):
            new = token_ids[rows < 0].unique()
            self.row_of[new] = torch.arange(self.n_rows, self.n_rows + len(new))
            self.n_rows += len(new)
            self._make_room()
            rows = self.row_of[token_ids]
        return rows

    def _make_room(self) -> None:
        missing = self.n_rows - len(self.used)
        if missing > 0:
            grown = max(missing, len(self.used))
            self.used = torch.cat([self.used, self.used.new_zeros(grown, *self.used.shape[1:])])
            self.occurred = torch.cat([self.occurred, self.occurred.new_zeros(grown, self.occurred.shape[1])])
