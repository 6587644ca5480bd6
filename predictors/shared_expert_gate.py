"""Shared expert gate: gate reuse on the residual plus what the layer's shared expert adds to it.

A shared expert runs for every token whatever the router says, so that its output is known without any expert that has to be loaded,
and is a large part of what the layer will add: router_{N+d}(norm_{N+d}(residual_N + shared_N(hidden_N))).

Only for models with shared experts. Cost: as gate reuse, and the shared expert once more, 6 * H * I_shared FLOPs a token: unlike the
model's own run of it, it comes before the layer waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from predictors.base import LayerView, ModelView
from predictors.gate_reuse import GateReuse
from prefetch.errors import ConfigError


@dataclass
class SharedExpertGate(GateReuse):
    """Scores are the target router's logits on the residual with the shared expert's output added."""

    name = "shared_expert_gate"

    def bind(self, model: ModelView) -> None:
        """Check that there is a shared expert.

        Raises:
            ConfigError: the model has none.
        """
        super().bind(model)
        if model.shared_experts is None:
            raise ConfigError("predictor=shared_expert_gate: this model has no shared experts; use gate_reuse or quasi_hidden")
        self.shared_experts = model.shared_experts

    def stream(self, seen: LayerView, target: int) -> Tensor:
        """residual + shared(hidden), [T, H]."""
        assert seen.residual is not None, "needs_residual is set: the runtime must capture the residual"
        return seen.residual + self.shared_experts[seen.layer](seen.hidden)
