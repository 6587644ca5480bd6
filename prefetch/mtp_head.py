"""The multi-token-prediction head that a checkpoint ships beside the model, as a draft head (`predictors/draft_head.py`).

    x = fc [norm_e(embedding of the coming token); norm_h(final state of the token before)]      state = norm(layer(x))

`layer` is one decoder layer of the model's own kind, with attention and an MoE block. transformers leaves these tensors alone, so that they
are read here: `mtp.fc`, `mtp.pre_fc_norm_embedding`, `mtp.pre_fc_norm_hidden`, `mtp.layers.0.*` and `mtp.norm`.

* Its attention sees its own token only, in training and live alike: a draft head answers token by token. A token alone attends to itself,
  whatever its position.
* Its experts are computed, not offloaded: they are of the layer behind the last, which no slot is for, and each token needs k of them. All E
  stay in memory, where the predictor computes: 3 E H I numbers, for Qwen3.6-35B-A3B (E = 256, H = 2048, I = 512) 1.6 GB in bfloat16 and
  0.1 GB for the rest of the head. They are read when a draft is made for the first time, so that other predictors pay nothing.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from predictors.base import AttentionView, LayerView
from predictors.learned import read_feature
from prefetch.checkpoint import Checkpoint
from prefetch.errors import CheckpointError
from prefetch.expert_tensors import load_expert
from prefetch.families import Family


class MtpNetwork(nn.Module):
    """The equation above. Modules are named as the checkpoint's tensors are.

    Args:
        decoder: the model's stack, whose classes of layers and norms the head is made of.
    """

    def __init__(self, decoder: Any):
        super().__init__()
        config = copy.deepcopy(decoder.config)
        config._experts_implementation = "eager"  # the model's own experts go to a runtime
        attending = next(i for i, layer in enumerate(decoder.layers) if hasattr(layer, "self_attn"))
        norm_class, hidden_size = type(decoder.norm), config.hidden_size
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = (
            norm_class(hidden_size, eps=config.rms_norm_eps) for _ in range(3)
        )
        self.fc = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.layers = nn.ModuleList([type(decoder.layers[attending])(config, attending)])

    def forward(self, token: Tensor, final: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Embedding and final state, [T, H] each, and the rotary embedding's cosine and sine, [T, 1, R] -> state [T, H]."""
        joined = self.fc(torch.cat([self.pre_fc_norm_embedding(token), self.pre_fc_norm_hidden(final)], dim=1))
        alone = joined.unsqueeze(1)  # T sequences of one token
        state: Tensor = self.norm(self.layers[0](alone, position_embeddings=rotation, attention_mask=None))
        return state.squeeze(1)


class MtpHead:
    """A `DraftHead` out of a checkpoint.

    Raises:
        CheckpointError: some of its tensors are missing.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family, decoder: Any, dtype: torch.dtype):
        self.checkpoint, self.family, self.dtype = checkpoint, family, dtype
        self.embed, self.rotary = decoder.embed_tokens, decoder.rotary_emb
        with torch.device("meta"):
            self.empty = MtpNetwork(decoder).to(dtype)
        missing = [name for name in self._plain_names() if family.mtp + name not in checkpoint]
        if missing:
            raise CheckpointError(f"{checkpoint.folder}: its draft head lacks {family.mtp}{missing[0]}")

    @cached_property
    def network(self) -> nn.Module:
        """With all its weights, in `dtype`.

        Raises:
            CheckpointError: a tensor has the wrong shape, or an expert is missing or damaged.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self.empty.state_dict().items()}
        tensors = {name: self.checkpoint.read(self.family.mtp + name, shapes[name]) for name in self._plain_names()}
        experts = {name: torch.empty(shape, dtype=self.dtype) for name, shape in shapes.items() if name not in tensors}
        gate_up, down = (experts[f"{self._experts}{part}"] for part in ("gate_up_proj", "down_proj"))
        for expert in range(len(gate_up)):
            load_expert(self.checkpoint, self.family, 0, expert, gate_up[expert], down[expert], root=self.family.mtp)
        weights = {name: tensor.to(self.dtype) for name, tensor in (tensors | experts).items()}
        self.empty.load_state_dict(weights, assign=True)
        return self.empty.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, seen: LayerView | AttentionView) -> Tensor:
        """The coming token's state [T, H], as the output head would read it, where `seen` is."""
        final = read_feature(seen, "previous_final").to(self.dtype)
        token = self.embed(seen.token_ids.to(self.embed.weight.device)).to(final)
        rotation = self.rotary(final.unsqueeze(1), torch.zeros(len(final), 1, dtype=torch.int64, device=final.device))
        state: Tensor = self.network.to(final.device)(token, final, rotation)
        return state

    @property
    def _experts(self) -> str:
        return f"layers.0.{self.family.moe_block}.{self.family.experts}."

    def _plain_names(self) -> list[str]:
        """Every tensor but the routed experts'."""
        return [name for name in self.empty.state_dict() if not name.startswith(self._experts)]


def read_mtp_head(checkpoint: Checkpoint, family: Family, decoder: Any, dtype: torch.dtype) -> MtpHead | None:
    """The checkpoint's head, None where it ships none.

    Raises:
        CheckpointError: it is incomplete.
    """
    return MtpHead(checkpoint, family, decoder, dtype) if family.mtp + "fc.weight" in checkpoint else None
