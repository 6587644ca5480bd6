"""APEX: a linear map before attention, distilled from the layer's own router, and a confidence that says how many experts to name.

After arXiv 2608.11688: z = W x + b with x the layer's normalised input before attention, trained by KL(router || softmax z). Of z the
best k + d are named and all others are scored *never*; d is the smallest number of extra experts with

    P(D <= d) = sigmoid(theta_d - w . q) >= confidence,    theta rising in d, at most `max_extra`,

where D is how many extra experts it would have taken to cover all k true ones: an ordinal logistic model, trained by the binary
cross-entropy of every P(D <= d). What q is was not seen in text; here it is z's margins in falling order, without gradient into z, so
that doubt about the boundary asks for more. A planner must allow for the extra experts: planner.extra = max_extra.

Cost per layer: (H + 1) E + E + max_extra + 1 parameters; 2 (H + 1) E FLOPs and one sort of E numbers per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, softplus

from predictors.base import AttentionView, LayerView, ModelView
from predictors.before_attention import BeforeAttention
from predictors.learned import OneHeadPerTarget, Truth, read_feature
from prefetch.errors import ConfigError


@dataclass
class Apex(BeforeAttention):
    """As many experts of the layer itself as its confidence asks for."""

    max_extra: int = 4  # experts beyond k
    confidence: float = 0.9  # that all true experts are among those named, wherever max_extra suffices

    while_running: ClassVar[frozenset[str]] = frozenset({"weights", "confidence"})

    name = "apex"

    def use(self, model: ModelView) -> None:
        """Take the model's sizes.

        Raises:
            ConfigError: a knob is out of range.
        """
        super().use(model)
        if not 0 <= self.max_extra <= model.n_experts - model.top_k:
            raise ConfigError(
                f"predictor.max_extra={self.max_extra}: it must be from 0 to {model.n_experts - model.top_k} for this model"
            )
        if not 0 < self.confidence < 1:
            raise ConfigError(f"predictor.confidence={self.confidence}: it must be between 0 and 1")

    def build(self) -> nn.Module:
        """A router and a confidence per layer."""
        return OneHeadPerTarget(
            {layer: DistilledRouter(self.model, self.max_extra, self.confidence) for layer in self.targets()}
        )

    def loss(self, logits: Tensor, truth: Truth) -> Tensor:
        """KL(router || prediction) plus the mean cross-entropy of every P(D <= d)."""
        assert self.network is not None
        head = self.network.get_submodule(f"heads.{truth.layer}")
        assert isinstance(head, DistilledRouter)
        wanted = truth.router_logits.log_softmax(-1)
        distilled = kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        enough = extra_needed(logits, truth.topk_ids)[:, None] <= torch.arange(self.max_extra + 1, device=logits.device)
        ordered = logits.detach().sort(dim=1, descending=True).values
        return distilled + binary_cross_entropy_with_logits(head.enough(ordered), enough.float())


class DistilledRouter(nn.Module):
    """pre_attention [T, H] -> logits [T, E]; when not training, -inf behind the experts that confidence asks for."""

    def __init__(self, model: ModelView, max_extra: int, confidence: float):
        super().__init__()
        self.top_k, self.confidence = model.top_k, confidence
        self.map = nn.Linear(model.hidden_size, model.n_experts)
        self.doubt = nn.Linear(model.n_experts, 1, bias=False)
        self.first = nn.Parameter(torch.zeros(1))  # theta_0
        self.steps = nn.Parameter(torch.zeros(max_extra))  # theta_d - theta_{d-1} = softplus(step)

    def forward(self, seen: LayerView | AttentionView) -> Tensor:
        """Logits [T, E]."""
        logits: Tensor = self.map(read_feature(seen, "pre_attention"))
        return logits if self.training else self.named_only(logits)

    def enough(self, ordered: Tensor) -> Tensor:
        """Logits [T, max_extra + 1] of P(D <= d) from a prediction's logits in falling order [T, E]."""
        thresholds = torch.cat([self.first, self.first + softplus(self.steps).cumsum(0)])
        boundary = ordered[:, self.top_k - 1 : self.top_k + 1].mean(dim=1, keepdim=True)
        found: Tensor = thresholds - self.doubt(ordered - boundary)
        return found

    def named_only(self, logits: Tensor) -> Tensor:
        """`logits` [T, E] with -inf from rank k + d on."""
        ordered, order = logits.sort(dim=1, descending=True, stable=True)
        unsure = torch.sigmoid(self.enough(ordered)) < self.confidence
        n_named = self.top_k + unsure[:, :-1].sum(dim=1, keepdim=True)  # P rises in d, and the last d is taken in any case
        named = torch.arange(logits.shape[1], device=logits.device) < n_named  # [T, E], by rank
        return torch.empty_like(logits).scatter_(1, order, ordered.masked_fill(~named, -torch.inf))


def extra_needed(logits: Tensor, topk_ids: Tensor) -> Tensor:
    """D [T]: how many experts beyond the k best of `logits` [T, E] it takes to cover `topk_ids` [T, k]."""
    ranks = logits.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    return ranks.gather(1, topk_ids).amax(dim=1) - (topk_ids.shape[1] - 1)
