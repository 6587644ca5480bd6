"""MLP: a two-layer perceptron per layer reads the router's input and names the experts of the layer `lookahead` further on.

ProMoE (arXiv 2410.22134): a free-standing network that knows nothing of the model's routers, so it has to learn all of them
from data, and may forget them out of domain. Cost per target layer: width * (H + E) + width + E parameters, 2 FLOPs for each
weight and token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from predictors.base import LayerView
from predictors.learned import LearnedPredictor, OneHeadPerTarget, Truth


@dataclass
class Mlp(LearnedPredictor):
    """Logits are W2 relu(W1 h + b1) + b2; trained as E yes-or-no questions (binary cross-entropy)."""

    width: int = 256  # of the hidden layer

    name = "mlp"

    def build(self) -> nn.Module:
        """One perceptron per target layer."""
        model = self.model
        return OneHeadPerTarget(
            {target: Perceptron(model.hidden_size, self.width, model.n_experts) for target in self.targets()}
        )

    def loss(self, logits: Tensor, truth: Truth) -> Tensor:
        """Mean binary cross-entropy over tokens and experts."""
        return binary_cross_entropy_with_logits(logits, truth.chosen)


class Perceptron(nn.Module):
    """hidden [T, H] -> logits [T, E]."""

    def __init__(self, hidden_size: int, width: int, n_experts: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden_size, width), nn.ReLU(), nn.Linear(width, n_experts))

    def forward(self, seen: LayerView) -> Tensor:
        """Logits [T, E] from the router's input."""
        logits: Tensor = self.layers(seen.hidden.float())
        return logits
