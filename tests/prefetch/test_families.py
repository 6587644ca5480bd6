"""Families against the modules transformers builds: names, shapes and which layers are MoE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
)

from prefetch.errors import UnsupportedModelError
from prefetch.families import FAMILIES, family_of, moe_geometry, moe_layer_indices
from tests.prefetch.tiny_families import deepseek_v2_config, deepseek_v3_config, gpt_oss_config, qwen3_next_config

SIZES: dict[str, Any] = {
    "num_hidden_layers": 6,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=4),
    "olmoe": OlmoeConfig(**SIZES, intermediate_size=48, num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=3),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=1),
    "qwen3_5_moe": Qwen3_5MoeTextConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=3),
    "deepseek_v2": deepseek_v2_config(),
    "deepseek_v3": deepseek_v3_config(first_k_dense_replace=2),
    "gpt_oss": gpt_oss_config(),
    "qwen3_next": qwen3_next_config(),
    "qwen3_moe, some dense": Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=16, num_experts=4, mlp_only_layers=[3], decoder_sparse_step=2
    ),
}


def decoder_layers(config: PretrainedConfig) -> list[torch.nn.Module]:
    with torch.device("meta"):
        return list(AutoModelForCausalLM.from_config(config).get_decoder().layers)


def test_every_model_type_is_tried_here():
    tried = {config.model_type for config in CONFIGS.values()}
    assert tried == {model_type for family in FAMILIES for model_type in family.model_types}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_names_and_sizes_are_those_of_the_modules(config):
    family, geometry, layers = family_of(config), moe_geometry(config, torch.float32), decoder_layers(config)
    indices = moe_layer_indices(config)
    assert geometry.n_layers == len(indices) > 0
    for i in indices:
        block = getattr(layers[i], family.moe_block)
        experts, router = getattr(block, family.experts), getattr(block, family.router)
        gate_up, down = (getattr(experts, name) for name in family.weights)
        assert experts.is_transposed == family.transposed and experts.is_concatenated != family.interleaved
        gate_up, down = (gate_up.mT, down.mT) if family.transposed else (gate_up, down)
        assert gate_up.shape == (geometry.n_experts, *geometry.expert.gate_up_shape)
        assert down.shape == (geometry.n_experts, *geometry.expert.down_shape)
        assert experts.has_bias == all(hasattr(experts, name) for name in family.biases)
        assert router.weight.shape == (geometry.n_experts, geometry.expert.hidden)
        assert router.top_k == geometry.top_k
        assert getattr(layers[i], family.pre_moe_norm).weight.shape == (geometry.expert.hidden,)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_moe_layers_are_those_with_experts(config):
    with_experts = [i for i, layer in enumerate(decoder_layers(config)) if hasattr(layer.mlp, "experts")]
    assert moe_layer_indices(config) == with_experts


def test_the_mixed_model_has_dense_layers():
    assert moe_layer_indices(CONFIGS["qwen3_moe, some dense"]) == [1, 5]
    assert moe_layer_indices(CONFIGS["deepseek_v3"]) == [2, 3]


def test_an_unsupported_architecture_is_named_beside_the_supported_ones():
    with pytest.raises(
        UnsupportedModelError,
        match=r"'llama' is not supported.* deepseek_v2, deepseek_v3, gpt_oss, mixtral, olmoe, qwen2_moe, qwen3_5_moe_text, qwen3_moe, qwen3_next",
    ):
        moe_geometry(LlamaConfig(), torch.float32)


def test_a_model_without_moe_layers_is_refused():
    config = Qwen3MoeConfig(**SIZES, mlp_only_layers=list(range(6)))
    with pytest.raises(UnsupportedModelError, match="no MoE layers"):
        moe_layer_indices(config)
