"""What a predictor is: it maps what one MoE layer has seen to scores for layers still to come.

It knows hidden states, routings and token ids. It knows no cache, no link, no clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.expert_form import ExpertForm


@dataclass(frozen=True)
class PreGateView:
    """The gates that a model ships for layers `level` further on."""

    level: int
    route: bool  # they are what routes those layers, instead of routers of their own
    logits: Mapping[int, Callable[[Tensor], Tensor]]  # target -> router input of the layer `level` before, [T, H] -> [T, E]


@dataclass(frozen=True)
class ModelView:
    """What a predictor may know of the model: its sizes and its own routers. `L` MoE layers, `E` experts, `k` per token."""

    n_layers: int
    n_experts: int
    top_k: int
    hidden_size: int
    router_logits: Sequence[Callable[[Tensor], Tensor]]  # per layer: normalised hidden [T, H] -> logits [T, E]
    pre_moe_norm: Sequence[Callable[[Tensor], Tensor]]  # per layer: residual [T, H] -> router input [T, H]
    fingerprint: str = ""  # identifies the routers' weights, whatever dtype they run in
    pre_gates: PreGateView | None = None  # where the checkpoint ships them
    shared_experts: Sequence[Callable[[Tensor], Tensor]] | None = None  # per layer: router input [T, H] -> added for all tokens
    device: torch.device = torch.device("cpu")  # where all of these compute
    draft_head: Callable[[LayerView | AttentionView], Tensor] | None = None  # as `predictors.draft_head`, where there is one
    # Per layer: router logits -> what its router takes the k highest of, [T, E]; None: the logits.
    choice_scores: Sequence[Callable[[Tensor], Tensor]] | None = None
    dtype: torch.dtype = torch.float32  # in which routers and norms compute
    norm_epsilon: float | None = None  # of `pre_moe_norm`, where all are RMS norms; None: not known
    expert_forms: Sequence[ExpertForm] | None = None  # per layer: activation and biases; None: SwiGLU without biases

    def router_scores(self, layer: int, router_input: Tensor) -> Tensor:
        """What the router of `layer` takes the k highest of, [T, E], when it reads `router_input` [T, H]."""
        logits = self.router_logits[layer](router_input)
        return logits if self.choice_scores is None else self.choice_scores[layer](logits)


@dataclass(frozen=True)
class AttentionView:
    """What is known of one MoE layer before its attention: half a layer ahead of its own router."""

    layer: int
    step: int
    sequence: int
    pre_attention: Tensor  # [T, H], the layer's normalised input
    token_ids: Tensor  # [T] int64
    previous_final: Tensor | None = None  # as in `LayerView`


@dataclass(frozen=True)
class LayerView:
    """What one MoE layer has seen when its router has just fired. `T` tokens of one forward pass."""

    layer: int  # MoE layer index, 0-based
    step: int  # forward pass of this sequence: 0 is the prefill, n the n-th decoded token
    sequence: int  # which sequence (prompt) of the run
    hidden: Tensor  # [T, H], the router's input
    residual: Tensor | None  # [T, H], the stream before the pre-MoE norm; None unless `needs_residual`
    topk_ids: Tensor  # [T, k] int64, what the router selected
    topk_weights: Tensor  # [T, k]
    token_ids: Tensor  # [T] int64
    pre_attention: Tensor | None = None  # [T, H], this layer's normalised input before attention; unless `needs_pre_attention`
    # [T, H], what the output head read of the token before each; unless `needs_previous_final`.
    previous_final: Tensor | None = None

    @property
    def before_attention(self) -> AttentionView:
        """What was known of this layer before its attention."""
        assert self.pre_attention is not None, "needs_pre_attention is set: the state must have been captured"
        return AttentionView(self.layer, self.step, self.sequence, self.pre_attention, self.token_ids, self.previous_final)


@dataclass(frozen=True)
class Prediction:
    """Scores for one coming MoE layer. Higher is likelier; only the order within a row carries meaning."""

    layer: int  # target layer; one that has routed already when it is predicted is meant for the next forward pass
    scores: Tensor  # [T, E], or [1, E] where the same ranking serves all tokens; finite, -inf = never


@dataclass(frozen=True)
class LinearHead:
    """Guesses for one coming layer that are linear in what the router of the present one reads."""

    target: int  # the layer that they are for
    weight: Tensor  # [E, H]
    bias: Tensor | None = None  # [E]


class Predictor(ABC):
    """Base of every predictor family. One file and one YAML each."""

    reads_states = True  # False: routing and token ids are all that it looks at, so that it can be replayed from a trace
    needs_residual = False  # True: the runtime captures `LayerView.residual`
    needs_pre_attention = False  # True: the runtime captures `LayerView.pre_attention`
    needs_previous_final = False  # True: the runtime captures `LayerView.previous_final`, which is None in a prefill
    before_attention = False  # True: `predict_before_attention` is called too; needs `needs_pre_attention`
    on_device = False  # True: it computes where the model does, and is handed that device's tensors; else the host's
    sees_every_call = False  # True: called even while every expert is on board and nothing can be prefetched
    name: str = ""

    def bind(self, model: ModelView) -> None:
        """Called once before the first prediction."""
        self.model = model

    def start_sequence(self) -> None:
        """A new sequence begins: forget what belonged to the last one."""

    def n_parameters(self) -> int:
        """Numbers that were made before the run; what a family counts while it runs is none."""
        return 0

    @abstractmethod
    def predict(self, seen: LayerView) -> list[Prediction]:
        """Scores for zero or more coming layers, nearest first. Called once per MoE layer call, in layer order."""

    def linear_heads(self, layer: int) -> list[LinearHead] | None:
        """All that `predict` says at `layer`, where that is linear in its router's input: a runtime may then compute it in the router's
        launch, and not call `predict`. None: it is not."""
        return None

    def predict_before_attention(self, seen: AttentionView) -> list[Prediction]:
        """Likewise, called ahead of each MoE layer's attention: `seen.layer` itself may be predicted, and is the nearest."""
        return []


def stable_top(scores: Tensor, m: int) -> Tensor:
    """Ids of the `m` highest scores per row, [T, m] int64; of equal scores the lower expert id comes first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :m]
