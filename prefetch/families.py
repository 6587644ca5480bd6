"""What differs between MoE model families: the checkpoint's names for routed experts, and the modules around them.

A new family is one `Family` in `FAMILIES`. Its experts must be SwiGLU without biases: down(silu(gate(x)) * up(x)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from kernels.quantised import QuantFormat
from prefetch.errors import UnsupportedModelError
from prefetch.geometry import ExpertGeometry, MoEGeometry
from prefetch.quantised_geometry import QuantisedGeometry


@dataclass(frozen=True)
class Family:
    """Names of one family. Checkpoint names are templates over `{layer}` (decoder layer) and `{expert}`; those of experts follow "model.".

    A checkpoint holds either per-expert tensors (as on the Hub) or, per layer, fused ones (as transformers holds them).
    """

    name: str
    model_types: tuple[str, ...]  # `config.model_type`
    gate: str  # [I, H]
    up: str  # [I, H]
    down: str  # [H, I]
    fused_gate_up: str = "layers.{layer}.mlp.experts.gate_up_proj"  # [E, 2I, H], gate rows then up rows
    fused_down: str = "layers.{layer}.mlp.experts.down_proj"  # [E, H, I]
    intermediate_size: str = "moe_intermediate_size"  # attribute of the config that holds I
    moe_block: str = "mlp"  # attribute of a decoder layer (transformers 5)
    pre_moe_norm: str = "post_attention_layernorm"  # attribute of a decoder layer
    pre_attention_norm: str = "input_layernorm"  # attribute of a decoder layer
    experts: str = "experts"  # attribute of the MoE block
    router: str = "gate"  # attribute of the MoE block; its `weight` is [E, H]
    shared_expert: str = "shared_expert"  # attribute of the MoE block, where a model has one
    shared_expert_gate: str = "shared_expert_gate"  # likewise: its sigmoid, [T, 1], weighs the shared expert
    draft_head: str = "draft_head"  # attribute of the model, None where it has none (see predictors/draft_head.py)
    mtp: str = "mtp."  # what the names of a multi-token-prediction head begin with, where a checkpoint ships one (prefetch/mtp_head.py)
    pre_gate: str = "model.layers.{layer}.mlp.pre_gate.weight"  # [E, H], where a checkpoint ships pre-gates


QWEN_EXPERT = "layers.{layer}.mlp.experts.{expert}."
MIXTRAL_EXPERT = "layers.{layer}.block_sparse_moe.experts.{expert}."

FAMILIES = (
    Family(
        "qwen_moe",
        model_types=("qwen3_moe", "qwen2_moe", "qwen3_5_moe_text"),
        gate=QWEN_EXPERT + "gate_proj.weight",
        up=QWEN_EXPERT + "up_proj.weight",
        down=QWEN_EXPERT + "down_proj.weight",
    ),
    Family(
        "olmoe",
        model_types=("olmoe",),
        gate=QWEN_EXPERT + "gate_proj.weight",
        up=QWEN_EXPERT + "up_proj.weight",
        down=QWEN_EXPERT + "down_proj.weight",
        intermediate_size="intermediate_size",
    ),
    Family(
        "mixtral",
        model_types=("mixtral",),
        gate=MIXTRAL_EXPERT + "w1.weight",
        up=MIXTRAL_EXPERT + "w3.weight",
        down=MIXTRAL_EXPERT + "w2.weight",
        intermediate_size="intermediate_size",
        pre_gate="model.layers.{layer}.block_sparse_moe.pre_gate.weight",
    ),
)


def family_of(config: PretrainedConfig) -> Family:
    """The family that `config.model_type` belongs to.

    Raises:
        UnsupportedModelError: none.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    supported = ", ".join(sorted(model_type for family in FAMILIES for model_type in family.model_types))
    raise UnsupportedModelError(f"model_type {config.model_type!r} is not supported; supported are {supported}")


def moe_layer_indices(config: PretrainedConfig) -> list[int]:
    """The decoder layers that are MoE, in order; position n in this list is MoE layer n of an `ExpertKey`.

    Raises:
        UnsupportedModelError: there is none.
    """
    dense_layers = getattr(config, "mlp_only_layers", None) or ()
    sparse_step = getattr(config, "decoder_sparse_step", 1)
    indices = [i for i in range(config.num_hidden_layers) if i not in dense_layers and (i + 1) % sparse_step == 0]
    if not indices or config.num_experts < 1:
        raise UnsupportedModelError(f"this {config.model_type} model has no MoE layers, so there is nothing to offload")
    return indices


def moe_geometry(config: PretrainedConfig, dtype: torch.dtype, how: QuantFormat | None = None) -> MoEGeometry:
    """Sizes of the routed experts when they are packed as `dtype`, or quantised from it where `how` says so.

    Raises:
        UnsupportedModelError: the family is unknown, or the model has no MoE layers.
        KernelInputError: the experts' sizes do not divide into the groups of `how`.
    """
    sizes = config.hidden_size, getattr(config, family_of(config).intermediate_size), dtype
    expert = ExpertGeometry(*sizes) if how is None else QuantisedGeometry(*sizes, how=how)
    return MoEGeometry(len(moe_layer_indices(config)), config.num_experts, config.num_experts_per_tok, expert)
