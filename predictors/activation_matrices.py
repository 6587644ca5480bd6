"""Activation matrices: past sequences that used the same experts so far tell which experts come next.

MoE-Infinity (arXiv 2401.14361): a sequence is summed up by its expert activation matrix A [L, E], A(l, e) = tokens of the sequence that
used e at layer l. A bounded collection keeps those of past sequences. The present one, A, is compared with each of them, M, over
the layers that have routed, and the best matches vote, each with its similarity as weight:

    similarity(M) = mean over layers l with A(l) > 0 of cos(A(l), M(l))        score(e) = sum of similarity(M) M(l, e) / sum_j M(l, j)

Where the collection is full, a finished sequence replaces the one most similar to it, so that it stays diverse (the paper clusters
offline). It learns online; the collection outlives sequences. A batch counts as one sequence.

Cost: capacity * L * E counters; per call 2 * capacity * E FLOPs to compare, since only one layer has changed, and capacity * L
additions. MoE-Infinity's weight for near layers orders prefetches across layers: here that is the planner's business.
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
class ActivationMatrices(Predictor):
    """Scores are the weighted activation shares of the most similar past sequences; none during the very first sequence."""

    lookahead: int = 1  # predicts this many coming layers, nearest first, into the next forward pass
    capacity: int = 128  # matrices kept
    matches: int = 4  # of them that vote

    name = "activation_matrices"
    reads_states = False

    def __post_init__(self) -> None:
        for knob in ("capacity", "matches"):
            if getattr(self, knob) < 1:
                raise ConfigError(f"predictor.{knob}={getattr(self, knob)}: it must be at least 1")

    def bind(self, model: ModelView) -> None:
        """Start with an empty collection."""
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers)
        self.n_kept = 0
        self.directions = torch.zeros(self.capacity, model.n_layers, model.n_experts)  # rows of past matrices, of length 1
        self.shares = torch.zeros(self.capacity, model.n_layers, model.n_experts)  # the same rows, adding up to 1
        self.present = torch.zeros(model.n_layers, model.n_experts)  # A
        self.layers_seen: set[int] = set()
        self.cosines = torch.zeros(self.capacity, model.n_layers)  # with the present matrix; 0 at layers it has not seen

    def start_sequence(self) -> None:
        """The last sequence's matrix joins the collection."""
        if self.layers_seen:
            self._keep()
        self.layers_seen.clear()
        self.present.zero_()
        self.cosines.zero_()

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Count this layer's routing, match, and rank the experts of coming layers: [1, E] each."""
        self.layers_seen.add(seen.layer)
        row = self.present[seen.layer]
        used = seen.topk_ids.reshape(-1).cpu()
        row.scatter_add_(0, used, torch.ones(len(used)))
        if not self.n_kept:
            return []
        cosines = self.directions[: self.n_kept, seen.layer] @ normalize(row, dim=0)[:, None]  # [n_kept, 1]
        self.cosines[: self.n_kept, seen.layer] = cosines.squeeze(1)
        best = self._similarity().topk(min(self.matches, self.n_kept))
        targets = coming_layers(seen.layer, self.lookahead, self.model.n_layers)
        votes = best.values.unsqueeze(0)
        return [Prediction(t, (votes @ self.shares[best.indices, t]).to(seen.topk_ids.device)) for t in targets]

    def _similarity(self) -> Tensor:
        """Of each matrix kept, [n_kept]; every layer that the present matrix has seen counts alike."""
        return self.cosines[: self.n_kept].sum(dim=1) / len(self.layers_seen)

    def _keep(self) -> None:
        if self.n_kept < self.capacity:
            place = self.n_kept
            self.n_kept += 1
        else:
            place = int(self._similarity().argmax())
        self.directions[place] = normalize(self.present, dim=1)
        self.shares[place] = normalize(self.present, p=1, dim=1)
