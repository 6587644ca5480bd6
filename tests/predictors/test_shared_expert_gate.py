"""Shared expert gate on a Qwen2-MoE, which has shared experts: against the unmodified model's own modules, and live."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from predictors.base import LayerView, Prediction
from predictors.shared_expert_gate import SharedExpertGate
from prefetch.errors import ConfigError
from tests.conftest import ATTENTION_SIZES, SPECIAL_TOKENS, save_random
from tests.prefetch.offloaded import Setting, decode, offloaded, plain

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Qwen2MoeConfig(**SIZES, **ATTENTION_SIZES, **SPECIAL_TOKENS)
    return save_random(Qwen2MoeForCausalLM, config, tmp_path_factory.mktemp("tiny_qwen2"))


class Noting(SharedExpertGate):
    """Keeps what it was shown and said."""

    def predict(self, seen: LayerView) -> list[Prediction]:
        predictions = super().predict(seen)
        self.said.append((seen, predictions))
        return predictions


@torch.inference_mode()
def test_live_it_reads_the_residual_plus_the_shared_experts_output_and_changes_no_logit(
    tiny_qwen2: Path, tmp_path: Path
) -> None:
    unmodified, predictor = plain(tiny_qwen2), Noting()
    predictor.said = []  # type: ignore[attr-defined]
    expected_tokens, expected_logits = decode(unmodified)
    with offloaded(tiny_qwen2, tmp_path, Setting(predictor=predictor)) as (model, runtime):
        tokens, logits = decode(model)
        assert runtime.predictor is predictor  # it did not fail
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)

    outputs: list[Tensor] = []
    n_checked = 0
    for seen, predictions in predictor.said:  # type: ignore[attr-defined]
        for p in predictions:
            block, target = unmodified.model.layers[seen.layer].mlp, unmodified.model.layers[p.layer]
            without_experts = block.shared_expert(seen.hidden) * block.shared_expert_gate(seen.hidden).sigmoid()
            router_input = target.post_attention_layernorm(seen.residual + without_experts)
            torch.testing.assert_close(p.scores, router_input @ target.mlp.gate.weight.T, rtol=1e-4, atol=1e-5)
            outputs.append(without_experts)
            n_checked += 1
    assert n_checked == len(predictor.said) * 2 // 3 > 100  # type: ignore[attr-defined]
    assert torch.cat(outputs).abs().max() > 1e-3


def test_a_model_without_shared_experts_is_refused(tiny_qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"predictor=shared_expert_gate: this model has no shared experts; use gate_reuse"):
        with offloaded(tiny_qwen3, tmp_path, Setting(predictor=SharedExpertGate())):
            pass
