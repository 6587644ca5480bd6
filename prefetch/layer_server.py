"""What every runtime is to the model: the server of its MoE layers, which sees each forward pass go by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.expert_form import PLAIN, ExpertForm
from predictors.base import AttentionView, LayerView, ModelView, Prediction, Predictor
from prefetch.geometry import MoEGeometry


class LayerServer(ABC):
    """Base of the runtimes. `prefetch.model.attach` calls it from the model's hooks, in the order of a forward pass.

    Args:
        geometry: sizes of the routed part of the model.
        predictor: guesses coming experts; a hint only.
        predicts_on: the device whose tensors the predictor is shown.
        computes_on: the device of the layers' tensors.
    """

    def __init__(self, geometry: MoEGeometry, predictor: Predictor, predicts_on: torch.device, computes_on: torch.device):
        self.geometry, self.predictor, self.predicts_on, self.computes_on = geometry, predictor, predicts_on, computes_on
        self.forms: Sequence[ExpertForm] = [PLAIN] * geometry.n_layers
        self.sequence, self.step = -1, 0
        self.token_ids = torch.empty(0, dtype=torch.int64)
        self.residual: Tensor | None = None  # of the layer in progress, where the predictor asks for it
        self.pre_attention: Tensor | None = None  # likewise
        self.last_final: Tensor | None = None  # [B, H], of each sequence's newest token that the whole stack has seen; likewise
        self.heard: dict[int, list[Prediction]] = {}  # by layer: what a fused router's heads guessed there
        self.previous_final: Tensor | None = None  # that of the forward pass before the one in progress

    def bind(self, model: ModelView) -> None:
        """Tell the predictor about the model, which `model` then shows to others too."""
        self.model = model
        if model.expert_forms is not None:
            self.forms = [form.to(self.computes_on) for form in model.expert_forms]
        self.predictor.bind(model)

    def begin_forward(self, token_ids: Tensor, *, new_sequence: bool) -> None:
        """A forward pass over `token_ids` [T] begins; `new_sequence` when it is a prefill."""
        if new_sequence:
            self.sequence, self.step = self.sequence + 1, 0
            self.predictor.start_sequence()
            self.last_final = None
        else:
            self.step += 1
        self.token_ids, self.previous_final = token_ids.to(self.predicts_on), self.last_final

    def hear(self, layer: int, predictions: list[Prediction]) -> None:
        """The predictor's heads, computed beside the router of `layer`, have spoken in its place."""
        self.heard[layer] = predictions

    def before_attention(self, layer: int, pre_attention: Tensor) -> None:
        """MoE layer `layer` is about to attend, with `pre_attention` [T, H] as its normalised input."""
        self.pre_attention = pre_attention

    @abstractmethod
    def layer_call(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The MoE layer's output [T, H].

        Args:
            layer: MoE layer index.
            hidden: [T, H], the router's input.
            topk_ids: [T, k] int64, what the router selected; `topk_weights`: [T, k].
        """

    def after_stack(self, final_hidden: Tensor) -> None:
        """All layers have run; `final_hidden` [B, n, H] is what the output head reads of n tokens of each sequence."""
        self.last_final = final_hidden[:, -1]

    @abstractmethod
    def end_forward(self) -> None:
        """The forward pass is over."""

    def leave(self) -> None:
        """The model is served no longer. A forward pass that raised has not ended."""

    def layer_view(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> LayerView:
        """What the predictor may see of a layer whose router has just fired."""
        states = hidden, self.residual, topk_ids, topk_weights, self.token_ids, self.pre_attention, self.previous_final
        return LayerView(layer, self.step, self.sequence, *map(self._shown, states))

    def attention_view(self, layer: int) -> AttentionView:
        """What it may see before the layer's attention."""
        states = self.pre_attention, self.token_ids, self.previous_final
        return AttentionView(layer, self.step, self.sequence, *map(self._shown, states))

    def _shown(self, state: Tensor | None) -> Any:
        return None if state is None else state.to(self.predicts_on)
