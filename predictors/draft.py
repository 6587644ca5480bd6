"""Draft: a multi-token-prediction head's hidden state for the coming token names the experts of all its layers before the first runs.

When token t has left the stack, its final state h_t says what is likely to come, and then token t + 1 itself is known. A draft head as in
DeepSeek-V3 (arXiv 2412.19437, section 2.2) and Qwen3-Next joins the two, here with a gated MLP instead of its attention block:

    f = M [norm(e); norm(h_t)],    d = f + D (silu(G norm(f)) * U norm(f)),    logits of layer l = V_l norm(d)

e is the coming token as the first MoE layer sees it before its attention, normalised: the embedding, where no dense layer is in
front. No draft token is made: the head is trained on the experts of the coming token, with binary cross-entropy, M included. It speaks
while decoding only; in a prefill h_t comes too late. The whole stack is known at once, and each layer's guess is handed over `lookahead`
layers before it is needed, or at the start.

Cost: 2 H^2 + 3 H width + 4 H + L E (H + 1) parameters, 2 FLOPs each per token, once per forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, silu

from predictors.base import AttentionView, LayerView, ModelView, Prediction
from predictors.learned import LearnedPredictor, Truth, read_feature
from predictors.lookahead import check_lookahead
from prefetch.errors import ConfigError


@dataclass
class Draft(LearnedPredictor):
    """Logits for every layer of a forward pass, made before its first."""

    lookahead: int = 3  # layers ahead of its use that a guess is handed over, as far as the pass has begun by then
    width: int = 384  # of the draft head's gated MLP

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
        """The draft head and one linear map for all layers' experts."""
        model = self.model
        return DraftNetwork(model.hidden_size, self.width, model.n_layers, model.n_experts)

    def loss(self, logits: Tensor, truth: Truth) -> Tensor:
        """Mean binary cross-entropy over tokens and experts."""
        return binary_cross_entropy_with_logits(logits, truth.chosen)

    def logits(self, views: Sequence[LayerView]) -> dict[int, Tensor]:
        """Layer -> [N, E], all from what was known before the first layer."""
        assert self.network is not None, "fit or bind comes first"
        return dict(enumerate(self.network(views[0]).unbind(1)))

    @torch.inference_mode()
    def predict_before_attention(self, seen: AttentionView) -> list[Prediction]:
        """Ahead of the first layer logits [T, E] float32 for it and the next `lookahead`, ahead of each later layer for one more."""
        if seen.step == 0:
            return []
        if seen.layer == 0:
            assert self.network is not None, "bind comes first"
            self.pending = [Prediction(layer, scores) for layer, scores in enumerate(self.network(seen).float().unbind(1))]
        in_reach = [prediction for prediction in self.pending if prediction.layer <= seen.layer + self.lookahead]
        self.pending = self.pending[len(in_reach) :]
        return in_reach

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Nothing: all that the draft says is known before."""
        return []


class DraftNetwork(nn.Module):
    """(previous_final [T, H], pre_attention of the first MoE layer [T, H]) -> logits [T, L, E]."""

    def __init__(self, hidden_size: int, width: int, n_layers: int, n_experts: int):
        super().__init__()
        self.norm_final, self.norm_token = nn.RMSNorm(hidden_size), nn.RMSNorm(hidden_size)
        self.join = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.norm_mlp, self.norm_out = nn.RMSNorm(hidden_size), nn.RMSNorm(hidden_size)
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)
        self.experts = nn.Linear(hidden_size, n_layers * n_experts)
        self.stack = n_layers, n_experts

    def draft_state(self, seen: LayerView | AttentionView) -> Tensor:
        """The draft head's hidden state [T, H] for the coming tokens."""
        final = self.norm_final(read_feature(seen, "previous_final"))
        token = self.norm_token(read_feature(seen, "pre_attention"))
        joined = self.join(torch.cat([token, final], dim=1))
        gate, up = self.gate_up(self.norm_mlp(joined)).chunk(2, dim=1)
        state: Tensor = joined + self.down(silu(gate) * up)
        return state

    def forward(self, seen: LayerView | AttentionView) -> Tensor:
        """Logits [T, L, E]."""
        logits: Tensor = self.experts(self.norm_out(self.draft_state(seen)))
        return logits.unflatten(1, self.stack)
