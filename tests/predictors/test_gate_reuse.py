"""Gate reuse against a plain transformers model: hidden states of a forward pass, and the norm and router by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from predictors.base import LayerView, ModelView
from predictors.gate_reuse import GateReuse

N_TOKENS = 40


@pytest.fixture(scope="module")
def model(tiny_qwen3: Path) -> PreTrainedModel:
    """Its norms are given weights of their own, so that taking another layer's norm would show."""
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        weight = layer.post_attention_layernorm.weight
        weight.data = 0.5 + torch.rand(weight.shape, generator=random)
    return model


@dataclass
class Pass:
    """What one forward pass of the unmodified model computed, per layer."""

    residuals: list[Tensor] = field(default_factory=list)  # entering the pre-MoE norm
    moe_outputs: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)  # the router's top-k ids
    hidden_states: tuple[Tensor, ...] = ()  # transformers' own record of the stream between layers


@pytest.fixture(scope="module")
def seen(model: PreTrainedModel) -> Pass:
    token_ids = torch.randint(model.config.vocab_size, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))
    found = Pass()
    with torch.no_grad(), ExitStack() as hooks:
        for layer in model.model.layers:
            norm, router = layer.post_attention_layernorm, layer.mlp.gate
            hooks.callback(norm.register_forward_hook(keep(found.residuals, lambda args, out: args[0][0])).remove)
            hooks.callback(router.register_forward_hook(keep(found.chosen, lambda args, out: out[2])).remove)
            hooks.callback(layer.mlp.register_forward_hook(keep(found.moe_outputs, lambda args, out: out[0])).remove)
        found.hidden_states = model(token_ids, output_hidden_states=True).hidden_states
    return found


def keep(kept: list[Tensor], choose: Callable[[Any, Any], Tensor]) -> Callable:
    return lambda module, args, out: kept.append(choose(args, out))


def bound(model: PreTrainedModel, lookahead: int) -> GateReuse:
    config, layers = model.config, model.model.layers
    routers = [lambda hidden, weight=layer.mlp.gate.weight: nn.functional.linear(hidden, weight) for layer in layers]
    norms = [layer.post_attention_layernorm for layer in layers]
    predictor = GateReuse(lookahead)
    predictor.bind(ModelView(len(layers), config.num_experts, config.num_experts_per_tok, config.hidden_size, routers, norms))
    return predictor


def view_at(layer: int, residual: Tensor) -> LayerView:
    """All that gate reuse may look at is the residual."""
    n_tokens = len(residual)
    nothing, no_ids = torch.zeros_like(residual), torch.zeros(n_tokens, 2, dtype=torch.long)
    return LayerView(layer, 0, 0, nothing, residual, no_ids, torch.zeros(n_tokens, 2), no_ids[:, 0])


@pytest.mark.parametrize("lookahead", [1, 2])
def test_logits_equal_norm_and_router_by_hand_in_float64(model: PreTrainedModel, seen: Pass, lookahead: int) -> None:
    predictor = bound(model, lookahead)
    for layer in range(len(model.model.layers) - lookahead):
        # A layer's output is residual + MoE(residual).
        residual = seen.hidden_states[layer + 1][0].double() - seen.moe_outputs[layer].double()
        target = model.model.layers[layer + lookahead]
        scale = (residual.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
        router_input = residual * scale * target.post_attention_layernorm.weight.double()
        expected = router_input @ target.mlp.gate.weight.double().T

        [prediction] = predictor.predict(view_at(layer, seen.residuals[layer]))

        assert prediction.layer == layer + lookahead
        torch.testing.assert_close(prediction.scores.double(), expected, rtol=1e-4, atol=1e-4)


def test_without_staleness_it_names_exactly_what_the_router_selects(model: PreTrainedModel, seen: Pass) -> None:
    predictor = bound(model, lookahead=1)
    for target in range(1, len(model.model.layers)):
        [prediction] = predictor.predict(view_at(target - 1, seen.residuals[target]))
        assert torch.equal(prediction.scores.topk(model.config.num_experts_per_tok).indices, seen.chosen[target])


def test_predicts_nothing_past_the_last_layer(model: PreTrainedModel) -> None:
    predictor = bound(model, lookahead=2)
    residual = torch.ones(1, model.config.hidden_size)
    predicted = [[p.layer for p in predictor.predict(view_at(layer, residual))] for layer in range(3)]
    assert predicted == [[2], [], []]
