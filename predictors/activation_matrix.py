"""Activation matrices: past sequences' [L, E] expert counts; the one most like this sequence so far says what comes.

MoE-Infinity (arXiv 2401.14361) keeps such matrices per request, matches the running request's by cosine, and prefetches what the
matches used at the coming layers. A full collection replaces the matrix most like the new one, so that it stays diverse.
Cost: (`capacity` + 1) L E numbers; 2 * capacity * L * E FLOPs a layer call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from predictors.base import LayerView, ModelView, Prediction, Predictor
from predictors.lookahead import check_lookahead, coming_layers
from prefetch.errors import ConfigError


@dataclass
class ActivationMatrix(Predictor):
    """Scores are shares of the target layer's activations in the best matches, weighted by their cosine."""

    lookahead: int = 1  # predicts this many coming layers, nearest first, into the next forward pass
    capacity: int = 64  # matrices of past sequences
    n_matches: int = 4  # that are averaged

    name = "activation_matrix"

    def __post_init__(self) -> None:
        if self.capacity < 1 or not 1 <= self.n_matches <= self.capacity:
            raise ConfigError(
                f"predictor.capacity={self.capacity} and predictor.n_matches={self.n_matches}: both must be at least 1, and as many "
                "matches as matrices at most"
            )

    def bind(self, model: ModelView) -> None:
        """Forget all sequences."""
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers)
        self.matrices = torch.zeros(0, model.n_layers * model.n_experts)  # counts
        self.running = torch.zeros(model.n_layers, model.n_experts)

    @torch.inference_mode()
    def start_sequence(self) -> None:
        """The sequence that ended joins the collection."""
        if self.running.any():
            self._keep(self.running.reshape(1, -1))
            self.running = torch.zeros_like(self.running)

    @torch.inference_mode()
    def predict(self, seen: LayerView) -> list[Prediction]:
        """Count this layer's routing, then [1, E] for coming layers; nothing until a sequence has ended."""
        self.running[seen.layer].scatter_add_(0, seen.topk_ids.reshape(-1), torch.ones(seen.topk_ids.numel()))
        if not len(self.matrices):
            return []
        likeness, matches = self._cosines(self.running.reshape(1, -1)).topk(min(self.n_matches, len(self.matrices)))
        shapes = self.matrices[matches].unflatten(1, self.running.shape)  # [matches, L, E]
        targets = coming_layers(seen.layer, self.lookahead, self.model.n_layers)
        return [Prediction(t, (likeness @ normalize(shapes[:, t], p=1.0))[None]) for t in targets]

    def _cosines(self, matrix: Tensor) -> Tensor:
        """[n] with every kept matrix; `matrix` is [1, L * E]."""
        return (normalize(self.matrices) @ normalize(matrix).T)[:, 0]

    def _keep(self, matrix: Tensor) -> None:
        if len(self.matrices) < self.capacity:
            self.matrices = torch.cat([self.matrices, matrix])
        else:
            self.matrices = self.matrices.clone()
            self.matrices[int(self._cosines(matrix).argmax())] = matrix[0]
