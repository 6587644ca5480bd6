"""What differs between MoE model families: the checkpoint's names for routed experts, and the modules around them.

A new family is one `Family` in `FAMILIES`. Its experts must have a gate, `kernels.gated_activation`, and may have biases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from kernels.gated_activation import CLAMPED_SWIGLU, SWIGLU, GatedActivation
from kernels.quantised import QuantFormat
from kernels.routing import Routing
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
    gate: str = "layers.{layer}.mlp.experts.{expert}.gate_proj.weight"  # [I, H]
    up: str = "layers.{layer}.mlp.experts.{expert}.up_proj.weight"  # [I, H]
    down: str = "layers.{layer}.mlp.experts.{expert}.down_proj.weight"  # [H, I]
    fused_gate_up: str = "layers.{layer}.mlp.experts.gate_up_proj"  # [E, 2I, H], gate rows then up rows
    fused_down: str = "layers.{layer}.mlp.experts.down_proj"  # [E, H, I]
    transposed: bool = False  # fused tensors are [E, H, 2I] and [E, I, H] instead
    interleaved: bool = False  # rows of gate_up, and its bias, alternate instead: gate, up, gate, up, ...
    activation: Callable[[PretrainedConfig], GatedActivation] = lambda config: SWIGLU
    intermediate_size: str = "moe_intermediate_size"  # attribute of the config that holds I
    n_experts: str = "num_experts"  # attribute of the config that holds E
    routing: Callable[[PretrainedConfig], Routing] | None = None  # the router's rule, where it is not the highest logits
    # The rule of a router that gives logits, weights and ids, which a kernel may then stand in for.
    fused_routing: Callable[[PretrainedConfig], Routing] | None = None
    selection_bias: str = "e_score_correction_bias"  # attribute of the router, [E], where that rule has one
    moe_block: str = "mlp"  # attribute of a decoder layer (transformers 5)
    pre_moe_norm: str = "post_attention_layernorm"  # attribute of a decoder layer
    pre_attention_norm: str = "input_layernorm"  # attribute of a decoder layer
    experts: str = "experts"  # attribute of the MoE block
    weights: tuple[str, str] = ("gate_up_proj", "down_proj")  # parameters of the experts, which are offloaded
    biases: tuple[str, str] = ("gate_up_proj_bias", "down_proj_bias")  # likewise, where a model has them; they stay
    router: str = "gate"  # attribute of the MoE block; its `weight` is [E, H]
    shared_expert: str = "shared_expert"  # attribute of the MoE block, where a model has one
    shared_expert_gate: str = "shared_expert_gate"  # likewise, where it has one: its sigmoid, [T, 1], weighs the shared expert
    draft_head: str = "draft_head"  # attribute of the model, None where it has none (see predictors/draft_head.py)
    mtp: str = "mtp."  # what the names of a multi-token-prediction head begin with, where a checkpoint ships one (prefetch/mtp_head.py)
    pre_gate: str = "model.layers.{layer}.mlp.pre_gate.weight"  # [E, H], where a checkpoint ships pre-gates


MIXTRAL_EXPERT = "layers.{layer}.block_sparse_moe.experts.{expert}."


def _deepseek_v2_routing(config: PretrainedConfig) -> Routing:
    """In V2 the groups are limited, in V2-Lite they are not."""
    n_groups, n_kept = (config.n_group, config.topk_group) if config.topk_method == "group_limited_greedy" else (1, 1)
    return Routing(
        config.num_experts_per_tok,
        scaling_factor=config.routed_scaling_factor,
        n_groups=n_groups,
        n_kept_groups=n_kept,
        group_score="best",
    )


def _deepseek_v3_routing(config: PretrainedConfig) -> Routing:
    return Routing(
        config.num_experts_per_tok,
        score="sigmoid",
        renormalise=config.norm_topk_prob,
        scaling_factor=config.routed_scaling_factor,
        n_groups=config.n_group,
        n_kept_groups=config.topk_group,
    )


def _softmax_routing(config: PretrainedConfig) -> Routing:
    """Those without the option renormalise."""
    return Routing(config.num_experts_per_tok, renormalise=getattr(config, "norm_topk_prob", True))


def _clamped_swiglu(config: PretrainedConfig) -> GatedActivation:
    alpha = getattr(config, "swiglu_alpha", CLAMPED_SWIGLU.alpha)  # older transformers have it in the code
    return replace(CLAMPED_SWIGLU, alpha=alpha, limit=getattr(config, "swiglu_limit", CLAMPED_SWIGLU.limit))


FAMILIES = (
    Family(
        "qwen_moe",
        model_types=("qwen3_moe", "qwen2_moe", "qwen3_next", "qwen3_5_moe_text"),
        fused_routing=_softmax_routing,
    ),
    Family("olmoe", model_types=("olmoe",), intermediate_size="intermediate_size", fused_routing=_softmax_routing),
    Family(
        "deepseek_v2",
        model_types=("deepseek_v2",),
        n_experts="n_routed_experts",
        shared_expert="shared_experts",
        routing=_deepseek_v2_routing,
    ),
    Family(
        "deepseek_v3",
        model_types=("deepseek_v3",),
        n_experts="n_routed_experts",
        shared_expert="shared_experts",
        routing=_deepseek_v3_routing,
    ),
    Family(
        "mixtral",
        model_types=("mixtral",),
        gate=MIXTRAL_EXPERT + "w1.weight",
        up=MIXTRAL_EXPERT + "w3.weight",
        down=MIXTRAL_EXPERT + "w2.weight",
        intermediate_size="intermediate_size",
        fused_routing=_softmax_routing,
        pre_gate="model.layers.{layer}.block_sparse_moe.pre_gate.weight",
    ),
    Family(
        "gpt_oss",
        model_types=("gpt_oss",),
        transposed=True,
        interleaved=True,
        activation=_clamped_swiglu,
        intermediate_size="intermediate_size",
        fused_routing=_softmax_routing,
        router="router",
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


def n_experts(config: PretrainedConfig) -> int:
    """Routed experts of each MoE layer, E."""
    return int(getattr(config, family_of(config).n_experts))


def moe_layer_indices(config: PretrainedConfig) -> list[int]:
    """The decoder layers that are MoE, in order; position n in this list is MoE layer n of an `ExpertKey`.

    Raises:
        UnsupportedModelError: there is none.
    """
    dense_layers = getattr(config, "mlp_only_layers", None) or ()
    sparse_step = getattr(config, "decoder_sparse_step", 1)
    first = getattr(config, "first_k_dense_replace", None) or 0
    indices = [i for i in range(first, config.num_hidden_layers) if i not in dense_layers and (i + 1) % sparse_step == 0]
    if not indices or n_experts(config) < 1:
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
    return MoEGeometry(len(moe_layer_indices(config)), n_experts(config), config.num_experts_per_tok, expert)
