"""Draft: a multi-token-prediction head's hidden state for the coming token names the experts of all its layers before the first runs.

When token t has left the stack, its final state h_t says what is likely to come, and then token t + 1 itself is known. A draft head joins
the two into a hidden state d of token t + 1 (`draft_head.py`), and logits of layer l = V_l norm(d). A checkpoint's own head is used
as it is where a model adapter offers one; a model without gets a small one that is trained along with V. The idea of asking
multi-token prediction is from DeepSeek-V3 (arXiv 2412.19437) and serving systems that prefetch by drafts (SP-MoE, arXiv 2510.10302); no
draft token is made here: head and V are trained on the experts of the coming token, with binary cross-entropy.

It speaks while decoding only; in a prefill h_t comes too late. The whole stack is known at once, and each layer's guess is handed over
when the router `lookahead` layers before it has fired, those of the first layers before the first one's attention: fetched earlier, experts
would only wait in slots that nearer layers need.

Cost: H + L E (H + 1) parameters and those of the trained head, 2 FLOPs each per token, once per forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from predictors.base import AttentionView, LayerView, ModelView, Prediction
from predictors.draft_head import TrainedDraftHead
from predictors.learned import LearnedPredictor, Truth
from predictors.lookahead import check_lookahead
from prefetch.errors import ConfigError, PredictorError


@dataclass
class Draft(LearnedPredictor):
    """Logits for every layer of a forward pass, made before its first."""

    lookahead: int = 1  # layers ahead of its use that a guess is handed over; from before the first layer where there are fewer
    width: int = 384  # of the trained draft head's gated MLP

    while_running: ClassVar[frozenset[str]] = frozenset({"weights", "lookahead"})
    pending: list[Prediction] = field(default_factory=list, init=False, repr=False)  # of this pass, not handed over yet

    name = "draft"
    needs_pre_attention = True
    needs_previous_final = True
    before_attention = True

    def use(self, model: ModelView) -> None:
        """Take the model's sizes; every layer of the pass is in reach.

        Raises:
            ConfigError: the lookahead reaches beyond the pass, or there is no width.
        """
        self.model = model
        check_lookahead(self.lookahead, model.n_layers - 1)
        if self.width < 1:
            raise ConfigError(f"predictor.width={self.width}: it must be at least 1")
        self.start_sequence()

    def start_sequence(self) -> None:
        """Nothing is left over from the last sequence."""
        self.pending = []

    def targets(self) -> dict[int, int]:
        """All layers, predicted at the first."""
        return dict.fromkeys(range(self.model.n_layers), 0)

    def build(self) -> nn.Module:
        """The map to the experts, and a draft head where the model has none."""
        model = self.model
        head = TrainedDraftHead(model.hidden_size, self.width) if model.draft_head is None else None
        return DraftNetwork(head, model.hidden_size, model.n_layers, model.n_experts)

    def loss(self, logits: Tensor, truth: Truth) -> Tensor:
        """Mean binary cross-entropy over tokens and experts."""
        return binary_cross_entropy_with_logits(logits, truth.chosen)

    def logits(self, views: Sequence[LayerView]) -> dict[int, Tensor]:
        """Layer -> [N, E], all from what was known before the first layer."""
        return dict(enumerate(self._whole_stack(views[0]).unbind(1)))

    def identity(self) -> dict[str, Any]:
        """Weights for a model's own draft head say nothing of another's."""
        return super().identity() | {"draft head": "trained" if self.model.draft_head is None else "the model's own"}

    @torch.inference_mode()
    def predict_before_attention(self, seen: AttentionView) -> list[Prediction]:
        """Ahead of the first layer, while decoding: logits [T, E] float32 for the first `lookahead` layers."""
        if seen.layer > 0 or seen.step == 0:
            return []
        self.pending = [Prediction(layer, scores) for layer, scores in enumerate(self._whole_stack(seen).unbind(1))]
        return self._in_reach(self.lookahead - 1)

    def predict(self, seen: LayerView) -> list[Prediction]:
        """What was known before, for one layer more: `lookahead` layers on."""
        return self._in_reach(seen.layer + self.lookahead)

    def _in_reach(self, last_layer: int) -> list[Prediction]:
        found = [prediction for prediction in self.pending if prediction.layer <= last_layer]
        self.pending = self.pending[len(found) :]
        return found

    def _whole_stack(self, seen: LayerView | AttentionView) -> Tensor:
        """Logits [T, L, E] float32 from what the first layer sees before its attention."""
        assert isinstance(self.network, DraftNetwork), "fit or bind comes first"
        head = self.model.draft_head or self.network.head
        assert head is not None, "a model without a draft head gets one in `build`"
        state = head(seen).float()
        if state.shape != (len(seen.token_ids), self.model.hidden_size):
            raise PredictorError(
                f"the model's draft head gave a state of shape {tuple(state.shape)}, expected "
                f"({len(seen.token_ids)}, {self.model.hidden_size}), one row per token"
            )
        logits: Tensor = self.network(state)
        return logits


class DraftNetwork(nn.Module):
    """The draft head, unless the model has its own, and one linear map from its state to all layers' experts."""

    def __init__(self, head: nn.Module | None, hidden_size: int, n_layers: int, n_experts: int):
        super().__init__()
        self.head = head
        self.norm = nn.RMSNorm(hidden_size)
        self.experts = nn.Linear(hidden_size, n_layers * n_experts)
        self.stack = n_layers, n_experts

    def forward(self, state: Tensor) -> Tensor:
        """A draft head's state [T, H] -> logits [T, L, E]."""
        logits: Tensor = self.experts(self.norm(state))
        return logits.unflatten(1, self.stack)
