"""Shipped pre-gate: the gates that came with the checkpoint say which experts the layer `level` further on will get.

Where they are hints, this is the pre-gate head (`pre_gate.py`, arXiv 2308.12066) with the checkpoint as its file. Where they
route, the answer is known: the coming layer's experts, no others, so that every prefetch is right.
Cost: none beyond the heads; 2 * H * E FLOPs a token and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from predictors.base import LayerView, ModelView, Prediction, Predictor
from prefetch.errors import ConfigError


@dataclass
class ShippedPreGate(Predictor):
    """Scores are the heads' logits; in a model that they route, all but the selected experts are ruled out."""

    name = "shipped_pre_gate"

    def bind(self, model: ModelView) -> None:
        """Raises:
        ConfigError: the checkpoint ships no pre-gates.
        """
        super().bind(model)
        if model.pre_gates is None:
            raise ConfigError(
                "predictor=shipped_pre_gate: the checkpoint ships no pre_gate weights; write them into a copy with "
                "python -m experiments.pre_gate, or choose another predictor"
            )
        self.gates = model.pre_gates

    @torch.inference_mode()
    def predict(self, seen: LayerView) -> list[Prediction]:
        """Logits [T, E] for layer `seen.layer + level`; nothing past the last layer."""
        target = seen.layer + self.gates.level
        if target >= self.model.n_layers:
            return []
        logits = self.gates.logits[target](seen.hidden).float()
        if self.gates.route:
            chosen = logits.softmax(-1).topk(self.model.top_k).indices  # the routers' own rule, so that ties fall alike
            logits = torch.full_like(logits, -torch.inf).scatter(1, chosen, logits.gather(1, chosen))
        return [Prediction(target, logits)]
