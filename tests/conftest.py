"""Tiny random checkpoints that many tests share, written by transformers itself as Hub-style safetensors."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# A background shell hands down an ignored Ctrl-C, which tests send and whose children must heed.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")  # a test run must not depend on luck; --hypothesis-profile=default explores further
torch.set_num_threads(1)  # tiny tensors: more threads only add hand-overs and noise

ATTENTION_SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
SPECIAL_TOKENS: dict[str, Any] = {  # random models: no token ends a text
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def qwen3_config(**changes: Any) -> Qwen3MoeConfig:
    """3 MoE layers of 8 experts, top-2, H = 32, I = 16, 64 tokens."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "initializer_range": 0.2,  # wide enough that routers prefer some experts and greedy tokens vary
    }
    return Qwen3MoeConfig(**{**sizes, **ATTENTION_SIZES, **SPECIAL_TOKENS, **changes})


def mixtral_config(**changes: Any) -> MixtralConfig:
    """2 MoE layers of 4 experts, top-2, H = 32, I = 48, 64 tokens."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    }
    return MixtralConfig(**{**sizes, **ATTENTION_SIZES, **SPECIAL_TOKENS, **changes})


def randomise_routers(model: PreTrainedModel) -> None:
    """Give every router its own random rows: an all-zero router would tie all experts."""
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=0.5)


def save_random(
    model_class: type[PreTrainedModel], config: PretrainedConfig, folder: Path, max_shard_size: str = "5GB"
) -> Path:
    """Write a randomly initialised fp32 model of `model_class` to `folder`; the seed is fixed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        randomise_routers(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny fp32 Qwen3-MoE checkpoint in one file (`qwen3_config`). Copy it before damaging it."""
    return save_random(Qwen3MoeForCausalLM, qwen3_config(), tmp_path_factory.mktemp("tiny_qwen3"))


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny fp32 Mixtral checkpoint in several shards (`mixtral_config`). Copy it before damaging it."""
    folder = tmp_path_factory.mktemp("tiny_mixtral")
    return save_random(MixtralForCausalLM, mixtral_config(), folder, max_shard_size="50KB")
