"""Sequence: a recurrent network reads which experts past tokens used in the whole stack, and forecasts the next token's.

After SeqMoE's idea of forecasting whole-stack activations from token to token, with a GRU in place of its state-space model:
x_t = multi-hot of all layers' top-k, s_t = GRU(W x_t, s_{t-1}), logits for token t + 1 = V s_t, [L, E]. It speaks when the last layer has
routed, so that the first layers, which no layer-ahead predictor reaches, are predicted too; the nearest layers of the next forward
pass come first. It knows nothing of the next token itself, only of what came before: expect less than from gate reuse.

Cost: (2 L E + 6 width) * width parameters, as many multiply-adds a token, once per forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from predictors.base import LayerView, ModelView, Prediction
from predictors.learned import LearnedPredictor, Truth
from predictors.lookahead import check_lookahead

SPAN = 64  # tokens in a row that training unrolls over; what is before them is forgotten


@dataclass
class ActivationSequence(LearnedPredictor):
    """Logits of a GRU over past tokens' experts, for the next forward pass."""

    lookahead: int = 4  # layers of the next forward pass that are predicted, the nearest first
    width: int = 128  # of the recurrent state

    while_running: ClassVar[frozenset[str]] = frozenset({"weights", "lookahead"})
    seen_ids: list[Tensor] = field(default_factory=list, init=False, repr=False)  # of this forward pass, layer by layer
    state: Tensor | None = field(default=None, init=False, repr=False)  # [1, B or 1, width]

    name = "sequence"

    def use(self, model: ModelView) -> None:
        """Take the model's sizes; every layer of the next forward pass is in reach."""
        self.model = model
        check_lookahead(self.lookahead, model.n_layers)
        self.start_sequence()

    def start_sequence(self) -> None:
        """The last sequence's tokens are not this one's past."""
        self.seen_ids, self.state = [], None

    def targets(self) -> dict[int, int]:
        """All layers are trained, whatever part of them `lookahead` shows; the last layer is where they are predicted."""
        return dict.fromkeys(range(self.model.n_layers), self.model.n_layers - 1)

    def build(self) -> nn.Module:
        """The network, over all layers at once."""
        return StackGru(self.model.n_layers, self.model.n_experts, self.width)

    def loss(self, logits: Tensor, truth: Truth) -> Tensor:
        """Mean binary cross-entropy over tokens and experts."""
        return binary_cross_entropy_with_logits(logits, truth.chosen)

    def draw(self, n_rows: int, batch_rows: int, order: torch.Generator) -> list[Tensor]:
        """Batches of whole spans of neighbouring tokens, in random order of the spans."""
        span = min(SPAN, batch_rows)
        firsts = torch.randperm(n_rows // span, generator=order) * span
        batches = [(chosen[:, None] + torch.arange(span)).reshape(-1) for chosen in firsts.split(batch_rows // span)]
        return [batch for batch in batches if len(batch) == batch_rows // span * span]

    def logits(self, views: Sequence[LayerView]) -> dict[int, Tensor]:
        """Layer -> [N, E]: each token's forecast from the tokens before it in its span. A rest shorter than a span is padded."""
        assert isinstance(self.network, StackGru), "fit or bind comes first"
        stack = torch.stack([view.topk_ids for view in views], dim=1)  # [N, L, k]
        n_tokens = len(stack)
        padded = torch.cat([stack, stack[-1:].expand(-n_tokens % SPAN, -1, -1)])
        past = rearrange(self.network.multi_hot(padded), "(spans tokens) inputs -> spans tokens inputs", tokens=SPAN)
        after, _ = self.network(past[:, :-1], None)
        first = self.network.at_the_start().expand(len(past), 1, -1, -1)  # the first token has nothing before it
        found = rearrange(torch.cat([first, after], dim=1), "spans tokens layers experts -> layers (spans tokens) experts")
        return dict(enumerate(found[:, :n_tokens]))

    @torch.inference_mode()
    def predict(self, seen: LayerView) -> list[Prediction]:
        """When the last layer has routed: logits for the next forward pass, [1, E] after a prefill, [T, E] when decoding."""
        self.seen_ids.append(seen.topk_ids)
        if seen.layer < self.model.n_layers - 1:
            return []
        assert isinstance(self.network, StackGru), "bind comes first"
        stack, self.seen_ids = torch.stack(self.seen_ids, dim=1), []
        x = self.network.multi_hot(stack)  # [T, L * E]
        is_prefill = seen.step == 0
        steps = x[None] if is_prefill else x[:, None]  # one sequence of T tokens, or T sequences of one
        state = self.state
        if state is not None and state.shape[1] != len(steps):  # from the shared state of a prefill to a batch's own
            state = state[:, -1:].expand(-1, len(steps), -1).contiguous()
        found, self.state = self.network(steps, state)
        return [Prediction(layer, found[:, -1, layer].float()) for layer in range(self.lookahead)]


class StackGru(nn.Module):
    """One GRU over tokens whose input and output are all layers' experts."""

    def __init__(self, n_layers: int, n_experts: int, width: int):
        super().__init__()
        self.n_layers, self.n_experts, self.n_inputs = n_layers, n_experts, n_layers * n_experts
        self.enter = nn.Linear(self.n_inputs, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.leave = nn.Linear(width, self.n_inputs)

    def multi_hot(self, stack: Tensor) -> Tensor:
        """[T, L, k] expert ids -> [T, L * E], 1 where a layer used the expert."""
        empty = torch.zeros(len(stack), self.n_layers, self.n_experts, device=stack.device)
        return empty.scatter(2, stack, 1.0).flatten(1)

    def at_the_start(self) -> Tensor:
        """[L, E]: logits when nothing has been seen."""
        logits: Tensor = self.leave(self.leave.weight.new_zeros(self.leave.in_features))
        return logits.view(self.n_layers, self.n_experts)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, n, L * E] -> logits for the token after each, [B, n, L, E], and the state [1, B, width] after the last."""
        states, last = self.gru(self.enter(x), state)
        return self.leave(states).unflatten(2, (self.n_layers, self.n_experts)), last
