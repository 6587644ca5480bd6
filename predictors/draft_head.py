"""Draft heads: what turns the last token's final state and the coming token into a hidden state of the coming token.

A model adapter offers its checkpoint's own (the attribute `Family.draft_head` of the loaded model); `TrainedDraftHead` stands in where a
model has none. A head answers for each token by itself: it is shown recorded tokens in any order in training, and those of a batch live.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from predictors.base import AttentionView, LayerView
from predictors.learned import read_feature

DraftHead = Callable[[LayerView | AttentionView], Tensor]  # previous_final, token_ids, pre_attention of layer 0 -> [T, H]


class TrainedDraftHead(nn.Module):
    """The form of DeepSeek-V3's (arXiv 2412.19437, section 2.2) and Qwen3-Next's, a gated MLP in place of their attention block.

        f = M [norm(e); norm(h)],    d = f + D (silu(G norm(f)) * U norm(f))

    h is `previous_final`; e is `pre_attention` of the first MoE layer, which is the token's normalised embedding where no dense
    layer is in front. 2 H^2 + 3 H width + 3 H parameters.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.norm_final, self.norm_token, self.norm_joined = (nn.RMSNorm(hidden_size) for _ in range(3))
        self.join = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, seen: LayerView | AttentionView) -> Tensor:
        """The draft's hidden state [T, H], float32."""
        token = self.norm_token(read_feature(seen, "pre_attention"))
        final = self.norm_final(read_feature(seen, "previous_final"))
        joined = self.join(torch.cat([token, final], dim=1))
        gate, up = self.gate_up(self.norm_joined(joined)).chunk(2, dim=1)
        state: Tensor = joined + self.down(silu(gate) * up)
        return state
