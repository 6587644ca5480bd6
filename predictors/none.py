"""No prediction: the floor every other predictor is compared with. Experts load when the router asks for them."""

from __future__ import annotations

from dataclasses import dataclass

from predictors.base import LayerView, Prediction, Predictor


@dataclass
class NoPredictor(Predictor):
    """Predicts nothing. No parameters, no FLOPs."""

    name = "none"
    reads_states = False

    def predict(self, seen: LayerView) -> list[Prediction]:
        """An empty list."""
        return []
