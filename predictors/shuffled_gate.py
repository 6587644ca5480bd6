"""Shuffled gate: a control. Gate reuse on the hidden state of some earlier token instead of this one's.

Norm, router and layer are right and only the token is wrong, so what is left is how often any two tokens agree: it must fall to
popularity or below. If it does not, gate reuse owes its recall to something else than the hidden state.

Cost: as gate reuse; keeps `reservoir` residuals per layer, a uniform sample of the forward passes so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from predictors.base import LayerView, ModelView
from predictors.gate_reuse import GateReuse
from prefetch.errors import ConfigError


@dataclass
class ShuffledGate(GateReuse):
    """Scores are the target router's logits on a residual drawn from earlier forward passes, of any sequence."""

    reservoir: int = 256  # residuals kept per layer
    seed: int = 0  # of the sample and the draws

    name = "shuffled_gate"

    def __post_init__(self) -> None:
        if self.reservoir < 1:
            raise ConfigError(f"predictor.reservoir={self.reservoir}: it must be at least 1")

    def bind(self, model: ModelView) -> None:
        """Begin with empty reservoirs."""
        super().bind(model)
        self.random = torch.Generator().manual_seed(self.seed)
        self.kept: list[Tensor | None] = [None] * model.n_layers  # [<= reservoir, H] each
        self.lots = [torch.empty(0)] * model.n_layers  # the random number by which each of them was kept

    def stream(self, seen: LayerView, target: int) -> Tensor | None:
        """For each of T tokens the residual of an earlier one at the same layer; nothing in the first forward pass."""
        assert seen.residual is not None, "needs_residual is set: the runtime must capture the residual"
        earlier = self.kept[seen.layer]
        self._keep(seen.layer, seen.residual)
        if earlier is None:
            return None
        drawn = torch.randint(len(earlier), (len(seen.residual),), generator=self.random)
        return earlier[drawn.to(earlier.device)]

    def _keep(self, layer: int, residual: Tensor) -> None:
        """Every token draws a lot once, and the highest lots stay: a uniform sample, whatever the number of tokens."""
        lots = torch.cat([self.lots[layer], torch.rand(len(residual), generator=self.random)])
        earlier = self.kept[layer]
        candidates = residual if earlier is None else torch.cat([earlier, residual])
        stay = lots.topk(min(self.reservoir, len(lots))).indices
        self.lots[layer], self.kept[layer] = lots[stay], candidates[stay.to(candidates.device)]
