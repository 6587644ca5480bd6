"""Pre-gate: at layer N a trained linear gate of its own selects for layer N + a, from nothing but layer N's router input.

Pre-gated MoE (arXiv 2308.12066) trains such gates together with the model and lets them route. Here the model's own routers keep
deciding and the heads only hint, so nothing is lost; a = `lookahead` is the paper's activation level. Each head starts as the
target's router seen through the ratio of the two norms, W diag(g_target / g_here), which is gate reuse exactly where both
are RMS norms, and is trained on which experts the router chose (binary cross-entropy; KL to the router's distribution
was 0.7 points of recall worse on the bundled model).

Cost per target layer: H * E parameters, 2 * H * E FLOPs a token: a router's own cost, and the least of all trained families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from predictors.base import LayerView, LinearHead, ModelView
from predictors.learned import LearnedPredictor, OneHeadPerTarget, Truth
from predictors.linear_router import router_matrix


@dataclass
class PreGate(LearnedPredictor):
    """One linear head per target layer."""

    name = "pre_gate"

    def build(self) -> nn.Module:
        """Heads without content; `prepare` or loading fills them."""
        model = self.model
        return OneHeadPerTarget({target: PreGateHead(model.hidden_size, model.n_experts) for target in self.targets()})

    def prepare(self, network: nn.Module, views: Sequence[LayerView]) -> None:
        """Start every head as gate reuse; the views only say in which dtype the model computes."""
        for target, source in self.targets().items():
            head = network.get_submodule(f"heads.{target}.gate")
            assert isinstance(head, nn.Linear)
            head.weight.copy_(reused_gate(self.model, source, target, views[source].hidden.dtype))

    def linear_heads(self, layer: int) -> list[LinearHead]:
        """The trained head itself."""
        target = layer + self.lookahead
        if target >= self.model.n_layers:
            return []
        assert self.network is not None, "bind comes first"
        head = self.network.get_submodule(f"heads.{target}.gate")
        assert isinstance(head, nn.Linear)
        return [LinearHead(target, head.weight)]

    def loss(self, logits: Tensor, truth: Truth) -> Tensor:
        """Mean binary cross-entropy over tokens and experts."""
        return binary_cross_entropy_with_logits(logits, truth.chosen)


class PreGateHead(nn.Module):
    """hidden [T, H] -> logits [T, E], without bias, as routers are."""

    def __init__(self, hidden_size: int, n_experts: int):
        super().__init__()
        self.gate = nn.Linear(hidden_size, n_experts, bias=False)

    def forward(self, seen: LayerView) -> Tensor:
        """Logits [T, E] from the router's input."""
        logits: Tensor = self.gate(seen.hidden.float())
        return logits


@torch.no_grad()
def reused_gate(model: ModelView, source: int, target: int, dtype: torch.dtype) -> Tensor:
    """[E, H] float32: what turns layer `source`'s router input into gate reuse's logits for layer `target`.

    An RMS norm is g * x / rms(x), so g is what it makes of ones, and W (g_target * x / rms) = (W diag(g_target / g_source)) hidden.
    Where layer `source` blanks a channel (g = 0), the head starts blind to it.
    """
    weight, _ = router_matrix(model, target, dtype)
    return weight * norm_ratio(model, source, target, dtype)


@torch.no_grad()
def norm_ratio(model: ModelView, source: int, target: int, dtype: torch.dtype) -> Tensor:
    """g_target / g_source, [1, H] float32; 0 where layer `source` blanks a channel."""
    ones = torch.ones(1, model.hidden_size, dtype=dtype, device=model.device)
    here, there = (model.pre_moe_norm[layer](ones).float() for layer in (source, target))
    return torch.where(here == 0, 0.0, there / here)
