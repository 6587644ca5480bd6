"""Margin gate: gate reuse as a trainable map, what this layer's experts will add, and a perceptron, trained on margins.

logits = G h + D w + V relu(U h + a) + b, with h this layer's router input and w [E] its gate weights, 0 where not selected.

* G starts as the target's router seen through the two norms (`reused_gate`) and D, V, b at zero: training starts at gate reuse.
* D w is what default vectors (arXiv 2603.19289) do to the target's logits, to first order: an average output per expert, weighted by
  the gate, read by the target's router. Here those E x E numbers are learned. w is also the routing feature of LLaPor.
* The usual target, selected or not, treats an expert that missed by a hair like one that was never considered. Here it is
  sigmoid(margin / temperature), the margin being the router's logit minus the middle between its k-th and (k+1)-th best: the
  order around the boundary is taught as well. Temperature 0 would be the usual binary cross-entropy.

Cost per target layer: H E + E^2 + width * (H + E + 1) + E parameters, 2 FLOPs each per token; the target's router is
not called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, relu

from predictors.base import LayerView, ModelView
from predictors.calibration import margins
from predictors.learned import LearnedPredictor, OneHeadPerTarget, Truth
from predictors.pre_gate import reused_gate
from prefetch.errors import ConfigError


@dataclass
class MarginGate(LearnedPredictor):
    """One head per target layer that starts as gate reuse."""

    width: int = 222  # of the perceptron
    temperature: float = 0.25  # of the margins that are learned, in units of the router's logits

    name = "margin_gate"

    def use(self, model: ModelView) -> None:
        """Take the model's sizes.

        Raises:
            ConfigError: a knob is out of range, or the model has too few layers for the lookahead.
        """
        super().use(model)
        if self.width < 1:
            raise ConfigError(f"predictor.width={self.width}: it must be at least 1")
        if not self.temperature > 0:
            raise ConfigError(f"predictor.temperature={self.temperature}: it must be above 0")

    def build(self) -> nn.Module:
        """Heads whose gates are still empty; `prepare` or loading fills them."""
        return OneHeadPerTarget({target: MarginHead(self.model, self.width) for target in self.targets()})

    def prepare(self, network: nn.Module, views: Sequence[LayerView]) -> None:
        """Start every head as gate reuse; the views only say in which dtype the model computes."""
        for target, source in self.targets().items():
            head = network.get_submodule(f"heads.{target}")
            assert isinstance(head, MarginHead)
            head.read.weight[: self.model.n_experts] = reused_gate(self.model, source, target, views[source].hidden.dtype)

    def loss(self, logits: Tensor, truth: Truth) -> Tensor:
        """Mean binary cross-entropy towards sigmoid(margin / temperature), over tokens and experts."""
        wanted = torch.sigmoid(margins(truth.router_logits, self.model.top_k) / self.temperature)
        return binary_cross_entropy_with_logits(logits, wanted)


class MarginHead(nn.Module):
    """What the target's router will say, from what this layer's router has read and said.

    Products that share an input, or a sum, are one: at one token it is the number of operations that takes the time.
    """

    def __init__(self, model: ModelView, width: int):
        super().__init__()
        self.n_experts = model.n_experts
        self.read = nn.Linear(model.hidden_size, model.n_experts + width)  # [G; U] and [b; a]
        self.add = nn.Linear(model.n_experts + width, model.n_experts, bias=False)  # [D, V]
        for silent in (self.read.bias[: model.n_experts], self.add.weight):
            nn.init.zeros_(silent)

    def forward(self, seen: LayerView) -> Tensor:
        """Logits [T, E]."""
        read = self.read(seen.hidden.float())
        gate, inner = read[:, : self.n_experts], read[:, self.n_experts :]
        used = torch.zeros_like(gate).scatter_(1, seen.topk_ids, seen.topk_weights.float())
        return torch.addmm(gate, torch.cat([used, relu(inner)], dim=1), self.add.weight.T)
