"""Gate reuse: the target layer's own router, applied early to the stream that will reach it.

Each layer adds little to the residual stream, so router_{N+d}(norm_{N+d}(residual_N)) already ranks most of the experts
that layer N+d will choose (Eliseev & Mazur, arXiv 2312.17238; with the target layer's norm, arXiv 2603.19289).
Cost: no parameters; one norm and 2 * H * E FLOPs a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from predictors.base import LayerView, LinearHead, ModelView, Prediction, Predictor
from predictors.linear_router import router_matrix
from predictors.lookahead import check_lookahead
from predictors.pre_gate import norm_ratio


@dataclass
class GateReuse(Predictor):
    """Scores are what the target's router would choose by on today's residual, for most models its logits. Variants replace the stream that it reads."""

    lookahead: int = 1  # layers between the observation and its one target

    name = "gate_reuse"
    needs_residual = True
    on_device = True

    def bind(self, model: ModelView) -> None:
        """Check the distance against the model's depth."""
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers - 1)

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Scores [T, E] for layer `seen.layer + lookahead`; nothing past the last layer."""
        target = seen.layer + self.lookahead
        if target >= self.model.n_layers:
            return []
        stream = self.stream(seen, target)
        if stream is None:
            return []
        router_input = self.model.pre_moe_norm[target](stream)
        return [Prediction(target, self.model.router_scores(target, router_input))]

    def linear_heads(self, layer: int) -> list[LinearHead] | None:
        """The target's router through the ratio of the two norms; None where it chooses by more than logits, and for variants."""
        if self.model.choice_scores is not None or type(self) is not GateReuse:
            return None
        target = layer + self.lookahead
        if target >= self.model.n_layers:
            return []
        weight, bias = router_matrix(self.model, target, self.model.dtype)
        ratio = norm_ratio(self.model, layer, target, self.model.dtype)
        return [LinearHead(target, weight * ratio, bias if bool(bias.any()) else None)]

    def stream(self, seen: LayerView, target: int) -> Tensor | None:
        """What `target`'s norm and router are applied to, [T, H]; None: there is nothing to go by yet."""
        assert seen.residual is not None, "needs_residual is set: the runtime must capture the residual"
        return seen.residual
