"""Previous token: what the sequence's last token used at the target layer, it will use again.

Neighbouring tokens share experts well above chance; after the last token's experts come those of the tokens before it,
most recent first. A cache that keeps recent experts holds most of these already: compare cold recall, not recall.
Cost: L * E counters; k writes a token and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from predictors.base import LayerView, ModelView, Prediction, Predictor
from predictors.lookahead import check_lookahead, coming_layers


@dataclass
class PreviousToken(Predictor):
    """Scores are recency: when the target layer last used each expert. One not used yet is never predicted."""

    lookahead: int = 1  # predicts this many coming layers, nearest first, into the next forward pass

    name = "previous_token"
    reads_states = False

    def bind(self, model: ModelView) -> None:
        """Prepare for sequences of this model."""
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers)
        self.start_sequence()

    def start_sequence(self) -> None:
        """The last sequence's tokens are not this one's past."""
        self.n_routed = [0] * self.model.n_layers  # (token, rank) pairs seen so far: the layer's clock
        # [1 or T, E] each: when each expert was last used. Replaced, not changed: records keep them.
        self.last_used: list[Tensor | None] = [None] * self.model.n_layers

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Note this layer's routing, then rank coming layers by recency: [1, E], or [T, E] when decoding a batch."""
        self._note(seen.layer, seen.topk_ids, prefill=seen.step == 0)
        targets = coming_layers(seen.layer, self.lookahead, self.model.n_layers)
        n_tokens = len(seen.topk_ids)
        known = [(t, used) for t in targets if (used := self.last_used[t]) is not None]
        return [Prediction(t, used) for t, used in known if len(used) in (1, n_tokens)]

    def _note(self, layer: int, topk_ids: Tensor, *, prefill: bool) -> None:
        """Stamp the experts with the clock; of one token, the better rank counts as more recent."""
        n_tokens, top_k = topk_ids.shape
        used = self.last_used[layer]
        if used is None:
            used = torch.full((1, self.model.n_experts), -torch.inf, device=topk_ids.device)
        start = self.n_routed[layer]
        if prefill:  # one ranking for what follows; later tokens overwrite earlier ones
            self.n_routed[layer] = start + n_tokens * top_k
            order = torch.arange(start, start + n_tokens * top_k, device=topk_ids.device, dtype=torch.float32)
            self.last_used[layer] = used.scatter_reduce(1, topk_ids.flip(1).reshape(1, -1), order.unsqueeze(0), "amax")
        else:  # each row is its own sequence and remembers for itself
            if len(used) not in (1, n_tokens):  # the batch has changed: what it shares still holds
                used = used.amax(0, keepdim=True)
            self.n_routed[layer] = start + top_k
            clock = torch.arange(start + top_k, start, -1, device=topk_ids.device, dtype=torch.float32)
            self.last_used[layer] = used.expand(n_tokens, -1).scatter(1, topk_ids, clock.expand(n_tokens, -1))
