"""One tiny random checkpoint per family, in the layout that its real checkpoints have.

Norms and biases are random too: as initialised (ones or zeros) they would hide a mix-up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.conftest import ATTENTION_SIZES, SPECIAL_TOKENS, save_random

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "initializer_range": 0.2, **ATTENTION_SIZES, **SPECIAL_TOKENS}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}


HYBRID: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def qwen3_next_config(**changes: Any) -> Qwen3NextConfig:
    """As `qwen3_5_config`."""
    return Qwen3NextConfig(**{**SIZES, **HYBRID, **changes})


def qwen3_5_config(**changes: Any) -> Qwen3_5MoeTextConfig:
    """3 layers of Gated DeltaNet and a last one of gated attention, each with 8 experts, top-2, I = 16."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    return Qwen3_5MoeTextConfig(**{**SIZES, **HYBRID, "rope_parameters": rope, **changes})


# One dense layer and three of 8 experts, top-3, in 4 groups of which 2 are kept; latent attention.
DEEPSEEK: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


def deepseek_v2_config(**changes: Any) -> DeepseekV2Config:
    """`DEEPSEEK` with the groups of V2; those of V2-Lite are not limited."""
    return DeepseekV2Config(**{**DEEPSEEK, "topk_method": "group_limited_greedy", **changes})


def deepseek_v3_config(**changes: Any) -> DeepseekV3Config:
    """`DEEPSEEK` with sigmoid scores and a bias on the choice."""
    return DeepseekV3Config(**{**DEEPSEEK, **changes})


def gpt_oss_config(**changes: Any) -> GptOssConfig:
    """A layer with a sliding window and one without, each with 8 experts, top-2, I = 64; the clamp is low enough to act."""
    sizes: dict[str, Any] = {
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "swiglu_limit": 1.5,
    }
    return GptOssConfig(**{**SIZES, **sizes, **changes})


def multimodal_qwen3_5(folder: Path) -> Path:
    """As on the Hub: a vision tower beside the language model, and fused experts."""
    config = Qwen3_5MoeConfig(text_config=qwen3_5_config().to_dict(), vision_config=VISION)
    return fuse(saved(Qwen3_5MoeForConditionalGeneration, config, folder))


def saved(model_class: type[PreTrainedModel], config: PretrainedConfig, folder: Path) -> Path:
    """A random checkpoint whose norms and biases are random too."""
    save_random(model_class, config, folder)
    random = torch.Generator().manual_seed(1)

    def shaken(name: str, tensor: Tensor) -> Tensor:
        small = "norm" in name or "bias" in name
        return tensor + 0.2 * torch.randn(tensor.shape, generator=random) if small else tensor

    return rewritten(folder, lambda tensors: {name: shaken(name, tensor) for name, tensor in tensors.items()})


def fuse(folder: Path) -> Path:
    """Stack the experts of each layer: gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""

    def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        for prefix in sorted({name.split(".experts.")[0] for name in tensors.keys() - kept.keys()}):
            pattern = re.compile(re.escape(prefix) + r"\.experts\.(\d+)\.gate_proj\.weight")
            n_experts = sum(1 for name in tensors if pattern.fullmatch(name))
            gate, up, down = (
                torch.stack([tensors[f"{prefix}.experts.{expert}.{part}_proj.weight"] for expert in range(n_experts)])
                for part in ("gate", "up", "down")
            )
            kept |= {f"{prefix}.experts.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.experts.down_proj": down}
        return kept

    return rewritten(folder, fused)


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """The checkpoint's one file with its tensors changed."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


def mxfp4_gpt_oss(folder: Path) -> Path:
    """As on the Hub: experts in mxfp4, of random codes and scales, the rest in bfloat16."""
    saved(GptOssForCausalLM, gpt_oss_config(), folder)

    def quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(5)
        found = {}
        for name, tensor in tensors.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                found[name] = tensor.bfloat16()
                continue
            n, columns, rows = tensor.shape
            found[name + "_blocks"] = torch.randint(256, (n, rows, columns // 32, 16), generator=random).byte()
            found[name + "_scales"] = torch.randint(121, 126, (n, rows, columns // 32), generator=random).byte()
        return found

    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))
    return rewritten(folder, quantised)


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "qwen3_5_moe_text": lambda folder: saved(Qwen3_5MoeForCausalLM, qwen3_5_config(), folder),
    "qwen3_5_moe": multimodal_qwen3_5,
    "qwen3_next": lambda folder: saved(Qwen3NextForCausalLM, qwen3_next_config(), folder),
    "deepseek_v2": lambda folder: saved(DeepseekV2ForCausalLM, deepseek_v2_config(), folder),
    "deepseek_v2_lite": lambda folder: saved(
        DeepseekV2ForCausalLM, deepseek_v2_config(topk_method="greedy", q_lora_rank=None), folder
    ),
    "gpt_oss": lambda folder: saved(GptOssForCausalLM, gpt_oss_config(), folder),
    "gpt_oss_mxfp4": mxfp4_gpt_oss,
    "deepseek_v3": lambda folder: saved(DeepseekV3ForCausalLM, deepseek_v3_config(), folder),
}


def with_mtp_head(folder: Path) -> Path:
    """Add what Qwen3.5's checkpoints ship beside the model: one more layer of attention and experts, with random weights."""

    def extended(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(2)
        root = "model.language_model." if any("language_model" in name for name in tensors) else "model."
        last = root + "layers.3."
        own = {"mtp.layers.0." + name.removeprefix(last): t for name, t in tensors.items() if name.startswith(last)}
        own |= {f"mtp.{name}.weight": torch.zeros(32) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
        own |= {"mtp.fc.weight": torch.zeros(32, 64)}
        return tensors | {name: 0.3 * torch.randn(tensor.shape, generator=random) for name, tensor in own.items()}

    return rewritten(folder, extended)
