"""What families share that speak before a layer attends: each layer is its own target, and lookahead is 0.

The lead time is one attention block, not a whole layer; in return the first MoE layer is predicted too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from predictors.base import AttentionView, LayerView, ModelView, Prediction
from predictors.learned import LearnedPredictor


@dataclass
class BeforeAttention(LearnedPredictor):
    """Base of trained families whose network reads `AttentionView.pre_attention`."""

    lookahead: int = field(default=0, init=False)  # the layer itself

    needs_pre_attention = True
    before_attention = True

    def use(self, model: ModelView) -> None:
        """Take the model's sizes."""
        self.model = model

    def targets(self) -> dict[int, int]:
        """Every layer, predicted at itself."""
        return {layer: layer for layer in range(self.model.n_layers)}

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Nothing: when the router has fired it is too late."""
        return []

    @torch.inference_mode()
    def predict_before_attention(self, seen: AttentionView) -> list[Prediction]:
        """Logits [T, E] float32 for layer `seen.layer`."""
        assert self.network is not None, "bind comes first"
        return [Prediction(seen.layer, self.network(seen, seen.layer).float())]
