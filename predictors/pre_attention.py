"""Pre-attention: two linear maps on a layer's normalised input before attention name the experts of that same layer.

After arXiv 2511.10676: logits = W2 silu(W1 x + b1) + b2, spoken before the layer attends. Trained to rank, with c_e the weight of an expert by its rank in the router's logits,
y_e whether it was selected and z_e the prediction's logit:

    mean_e c_e BCE(z_e, y_e) + 0.3 mean over pairs (selected i, other j) of max(0, 0.1 - (z_i - z_j))

The paper's c for top-6 of 64 experts is 3 for ranks 1 to 10, 1.5 to rank 30, 0.5 behind; here the ranks scale with the model's k. That
the hinge is taken on logits was not seen in text.

Cost per layer: width * (H + E + 1) + E parameters, 2 FLOPs each per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, silu

from predictors.base import AttentionView, LayerView, ModelView
from predictors.before_attention import BeforeAttention
from predictors.learned import OneHeadPerTarget, Truth, read_feature
from prefetch.errors import ConfigError

RANKS = 10 / 6, 30 / 6  # of the router's order, in units of k, at which the class weights change
CLASS_WEIGHTS = 3.0, 1.5, 0.5
HINGE_SHARE, HINGE_MARGIN = 0.3, 0.1


@dataclass
class PreAttention(BeforeAttention):
    """Each layer's own experts, half a layer before its router."""

    width: int = 256  # between the two maps

    name = "pre_attention"

    def use(self, model: ModelView) -> None:
        """Take the model's sizes.

        Raises:
            ConfigError: there is no width.
        """
        super().use(model)
        if self.width < 1:
            raise ConfigError(f"predictor.width={self.width}: it must be at least 1")

    def build(self) -> nn.Module:
        """Two maps per layer."""
        model = self.model
        return OneHeadPerTarget({layer: TwoMaps(model.hidden_size, self.width, model.n_experts) for layer in self.targets()})

    def loss(self, logits: Tensor, truth: Truth) -> Tensor:
        """Class-weighted binary cross-entropy plus a hinge over pairs."""
        chosen = truth.chosen
        bce = binary_cross_entropy_with_logits(logits, chosen, class_weights(truth.router_logits, self.model.top_k))
        return bce + HINGE_SHARE * pairwise_hinge(logits, truth.topk_ids)


class TwoMaps(nn.Module):
    """pre_attention [T, H] -> logits [T, E]."""

    def __init__(self, hidden_size: int, width: int, n_experts: int):
        super().__init__()
        self.enter = nn.Linear(hidden_size, width)
        self.leave = nn.Linear(width, n_experts)

    def forward(self, seen: LayerView | AttentionView) -> Tensor:
        """Logits [T, E]."""
        logits: Tensor = self.leave(silu(self.enter(read_feature(seen, "pre_attention"))))
        return logits


def class_weights(router_logits: Tensor, top_k: int) -> Tensor:
    """c [T, E] by each expert's rank in its row of `router_logits` [T, E]."""
    near, middle = (round(share * top_k) for share in RANKS)
    ranks = router_logits.argsort(dim=1, descending=True).argsort(dim=1)
    first, second, rest = CLASS_WEIGHTS
    return torch.where(ranks < near, first, torch.where(ranks < middle, second, rest))


def pairwise_hinge(logits: Tensor, topk_ids: Tensor) -> Tensor:
    """Mean of max(0, margin - (z_i - z_j)) over selected i and other j, for `logits` [T, E] and `topk_ids` [T, k]."""
    selected = logits.gather(1, topk_ids)
    other = torch.ones_like(logits, dtype=torch.bool).scatter_(1, topk_ids, False)
    others = logits[other].view(len(logits), -1)
    return (HINGE_MARGIN - (selected[:, :, None] - others[:, None, :])).clamp_min(0).mean()
