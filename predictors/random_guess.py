"""Random guess: a control. It knows nothing, so of m guesses it finds m / E of the true experts, whatever the model.

A metric under which it does better than that is wrong. Cost: E random numbers a token and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from predictors.base import LayerView, ModelView, Prediction, Predictor
from predictors.lookahead import check_lookahead, coming_layers


@dataclass
class RandomGuess(Predictor):
    """Scores are drawn uniformly, for every token and layer anew."""

    lookahead: int = 1  # predicts this many coming layers, nearest first, into the next forward pass
    seed: int = 0  # of the draws

    name = "random_guess"
    reads_states = False

    def bind(self, model: ModelView) -> None:
        """Begin the draws afresh."""
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers)
        self.random = torch.Generator().manual_seed(self.seed)

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Scores [T, E] in [0, 1); [1, E] for the next forward pass, whose number of tokens is not known yet."""
        targets = coming_layers(seen.layer, self.lookahead, self.model.n_layers)
        n_rows = {target: len(seen.topk_ids) if target > seen.layer else 1 for target in targets}
        device = seen.topk_ids.device
        return [
            Prediction(target, torch.rand(n_rows[target], self.model.n_experts, generator=self.random).to(device))
            for target in targets
        ]
