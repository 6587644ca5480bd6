"""A transformers model whose routed experts live in an `ExpertStore` instead of in its parameters.

Non-expert weights load through transformers as usual. The experts modules lose their parameters before any weight is
materialised, and their forward goes to a runtime (`LayerServer`) through transformers' experts interface.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_cuda_stream_capturing

from kernels.expert_form import ExpertForm
from kernels.quantised import QuantFormat, dequantise, quantise
from kernels.routing import choice_scores
from predictors.base import ModelView, PreGateView
from prefetch.checkpoint import Checkpoint, read_config
from prefetch.errors import CheckpointError, UnsupportedModelError
from prefetch.expert_tensors import gate_then_up
from prefetch.families import Family, family_of, moe_layer_indices
from prefetch.fused_router import FusedRouter
from prefetch.geometry import MoEGeometry
from prefetch.layer_server import LayerServer
from prefetch.mtp_head import read_mtp_head
from prefetch.pre_gate import PreGates, read_pre_gates
from prefetch.pre_gated_routing import route_by

CPU = torch.device("cpu")
R = TypeVar("R", bound=LayerServer)
IMPLEMENTATION = "gatecast"  # the name under which our experts forward is registered with transformers


def load_offloaded(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The causal language model in `folder` without its routed experts, on `device`, in evaluation mode.

    Raises:
        UnsupportedModelError: no family knows where this architecture keeps its experts, or it is not a SwiGLU MoE.
        CheckpointError: non-expert weights are missing from the checkpoint, or it ships pre-gates or a draft head that do not fit it.
    """
    config = read_config(folder)
    family = family_of(config)
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(f"{folder}: hidden_act={config.hidden_act!r}; gatecast's expert MLP computes 'silu' only")
    with quiet_transformers():
        model, report = _without_experts(type(config), family).from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True
        )
    if report["missing_keys"]:
        raise CheckpointError(f"{folder}: the checkpoint lacks {', '.join(sorted(report['missing_keys'])[:5])}")
    model.set_experts_implementation(IMPLEMENTATION)
    checkpoint = Checkpoint(folder)
    _use_pre_gates(model, checkpoint)
    setattr(model, family.draft_head, read_mtp_head(checkpoint, family, model.get_decoder(), dtype))
    return model.to(device).eval()


def load_whole(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", how: QuantFormat | None = None
) -> PreTrainedModel:
    """The model in `folder` with all its experts, on `device`, as transformers runs it: what offloading must equal.

    Args:
        how: round the routed experts' weights to what this format can hold, as a pack of that format does.

    Raises:
        CheckpointError: it ships pre-gates that do not fit it.
        KernelInputError: `how` does not fit the experts' sizes or weights.
    """
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **_dequantised(folder))
    if how is not None:
        _round_experts(model, how)
    _use_pre_gates(model, Checkpoint(folder))
    return model.to(device).eval()


@contextmanager
def attach(model: PreTrainedModel, runtime: R, *, fuse_routers: bool = False) -> Iterator[R]:
    """Let `runtime`, driven by the host or by the device, serve the MoE layers of `model` for the length of a `with` block.

    Args:
        fuse_routers: a kernel computes each router, and what of the predictor is linear, in one launch (`prefetch/fused_router.py`).

    Raises:
        UnsupportedModelError: the family's routers cannot be fused.
    """
    family = family_of(model.config)
    blocks = moe_blocks(model, family)
    runtime.bind(model_view(model, family, runtime.geometry, runtime.predicts_on))
    with ExitStack() as undo:
        undo.callback(runtime.leave)
        for layer, block in enumerate(blocks):
            experts = getattr(block, family.experts)
            experts.offload_layer, experts.offload_runtime = layer, runtime
            undo.callback(delattr, experts, "offload_runtime")
        if fuse_routers:
            for layer, fused in enumerate(_fused_routers(model, family, runtime)):
                router = getattr(blocks[layer], family.router)
                router.forward = fused  # of this module alone, in place of its class's
                undo.callback(delattr, router, "forward")
        if runtime.predictor.needs_residual:
            for norm in pre_moe_norms(model, family):
                undo.callback(norm.register_forward_pre_hook(_capture_residual(runtime)).remove)
        if runtime.predictor.needs_pre_attention:
            for layer, layer_module in enumerate(_moe_layers(model)):
                norm = getattr(layer_module, family.pre_attention_norm)
                undo.callback(norm.register_forward_hook(_before_attention(runtime, layer)).remove)
        if runtime.predictor.needs_previous_final:
            undo.callback(model.get_decoder().register_forward_hook(_after_stack(runtime)).remove)
        undo.callback(model.register_forward_pre_hook(_begin(runtime), with_kwargs=True).remove)
        undo.callback(model.register_forward_hook(_end(runtime)).remove)
        yield runtime


def _fused_routers(model: PreTrainedModel, family: Family, runtime: LayerServer) -> list[FusedRouter]:
    if family.fused_routing is None:
        raise UnsupportedModelError(
            f"backend.router=fused: the routers of {model.config.model_type} leave the choice to their block; choose backend.router=model"
        )
    routing = family.fused_routing(model.config)
    routers = [getattr(block, family.router) for block in moe_blocks(model, family)]
    return [
        FusedRouter(
            router.weight,
            getattr(router, "bias", None),
            runtime.predictor.linear_heads(layer),
            routing,
            partial(runtime.hear, layer),
        )
        for layer, router in enumerate(routers)
    ]


def model_view(model: PreTrainedModel, family: Family, geometry: MoEGeometry, device: torch.device = CPU) -> ModelView:
    """What predictors may know of `model`, to be computed on `device`: parts that are elsewhere are copied there."""
    blocks = moe_blocks(model, family)
    routers = [_on(device, getattr(block, family.router)) for block in blocks]
    return ModelView(
        geometry.n_layers,
        geometry.n_experts,
        geometry.top_k,
        geometry.expert.hidden,
        [_logits_of(router) for router in routers],
        [_on(device, norm).forward for norm in pre_moe_norms(model, family)],  # as modules they would fire our own hooks
        _fingerprint(routers),
        _pre_gate_view(model.pre_gates, routers, device) if model.pre_gates is not None else None,
        _shared_experts(blocks, family, device),
        device,
        _draft_head(model, family, device),
        choice_scores=_choice_scores(model, family, routers),
        dtype=routers[0].weight.dtype,
        norm_epsilon=getattr(model.config, "rms_norm_eps", None),
        expert_forms=[_expert_form(model, block, family, device) for block in blocks],
    )


def _choice_scores(model: PreTrainedModel, family: Family, routers: list[Any]) -> list[Callable[[Tensor], Tensor]] | None:
    if family.routing is None:
        return None
    rule = family.routing(model.config)
    biases = [getattr(router, family.selection_bias, None) for router in routers]
    return [partial(choice_scores, routing=rule, selection_bias=bias) for bias in biases]


def _expert_form(model: PreTrainedModel, block: nn.Module, family: Family, device: torch.device) -> ExpertForm:
    activation, experts = family.activation(model.config), getattr(block, family.experts)
    gate_up, down = (getattr(experts, name, None) for name in family.biases)
    if gate_up is None or down is None:
        return ExpertForm(activation)
    gate_up = gate_then_up(gate_up.detach().T).T.contiguous() if family.interleaved else gate_up.detach()
    return ExpertForm(activation, gate_up, down.detach()).to(device)


def _draft_head(model: PreTrainedModel, family: Family, device: torch.device) -> Any:
    head = getattr(model, family.draft_head, None)
    return _on(device, head) if isinstance(head, nn.Module) else head


def _on(device: torch.device, module: Any) -> Any:
    """`module`, or a copy of it, on `device`."""
    elsewhere = any(parameter.device != device for parameter in module.parameters())
    return copy.deepcopy(module).to(device) if elsewhere else module


def moe_blocks(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """The MoE blocks of the model, in layer order."""
    return [getattr(layer, family.moe_block) for layer in _moe_layers(model)]


def pre_moe_norms(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    """The norm in front of each MoE block."""
    return [getattr(layer, family.pre_moe_norm) for layer in _moe_layers(model)]


def _moe_layers(model: PreTrainedModel) -> list[nn.Module]:
    layers = model.get_decoder().layers
    return [layers[i] for i in moe_layer_indices(model.config)]


def _dequantised(folder: Path) -> dict[str, Any]:
    """How to load quantised experts as the float weights that a pack holds, whatever kernels for them transformers finds."""
    quantised = hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    return {"quantization_config": Mxfp4Config(dequantize=True)} if quantised else {}


def _use_pre_gates(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Take the checkpoint's pre-gates, None where it ships none, and let them decide where it says so."""
    model.pre_gates = read_pre_gates(checkpoint)
    if model.pre_gates is not None and model.pre_gates.route:
        family = family_of(model.config)
        route_by([getattr(block, family.router) for block in moe_blocks(model, family)], model.pre_gates)


@torch.no_grad()
def _round_experts(model: PreTrainedModel, how: QuantFormat) -> None:
    family = family_of(model.config)
    for block in moe_blocks(model, family):
        for name in family.weights:
            stored = getattr(getattr(block, family.experts), name)
            weight = stored.transpose(1, 2) if family.transposed else stored  # gate_up [E, 2I, H], down [E, H, I]
            weight.copy_(dequantise(quantise(weight.flatten(0, 1), how), how).view(weight.shape))


def _shared_experts(blocks: list[nn.Module], family: Family, device: torch.device) -> list[Callable[[Tensor], Tensor]] | None:
    """What each block adds for every token, None where the architecture has no shared expert."""
    if not all(hasattr(block, family.shared_expert) for block in blocks):
        return None
    return [_shared_expert(block, family, device) for block in blocks]


def _shared_expert(block: nn.Module, family: Family, device: torch.device) -> Callable[[Tensor], Tensor]:
    expert = _on(device, getattr(block, family.shared_expert))
    if not hasattr(block, family.shared_expert_gate):
        return partial(_output, expert)
    return partial(_gated_output, expert, _on(device, getattr(block, family.shared_expert_gate)))


def _output(expert: nn.Module, hidden: Tensor) -> Tensor:
    output: Tensor = expert(hidden)
    return output


def _gated_output(expert: nn.Module, gate: nn.Module, hidden: Tensor) -> Tensor:
    output: Tensor = torch.sigmoid(gate(hidden)) * expert(hidden)
    return output


def _pre_gate_view(pre_gates: PreGates, routers: list[Any], device: torch.device) -> PreGateView:
    """Where the heads route, their logits are the router's own, to the bit."""
    logits: Mapping[int, Callable[[Tensor], Tensor]]
    if pre_gates.route:
        logits = {target: _logits_of(routers[target]) for target in range(pre_gates.level, len(routers))}
    else:
        heads = enumerate(pre_gates.heads, start=pre_gates.level)
        logits = {target: partial(_head_logits, head.float().to(device)) for target, head in heads}
    return PreGateView(pre_gates.level, pre_gates.route, logits)


def _head_logits(head: Tensor, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden.float(), head)


def _fingerprint(routers: list[Any]) -> str:
    """Of the routers' weights as bfloat16, so that a checkpoint is the same whatever dtype it is loaded in."""
    digest = hashlib.blake2b(digest_size=16)
    for router in routers:
        digest.update(router.weight.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _logits_of(router: Any) -> Callable[[Tensor], Tensor]:
    weight, bias = router.weight, getattr(router, "bias", None)
    return lambda hidden: nn.functional.linear(hidden, weight, bias)


def _without_experts(config_class: type, family: Family) -> type[PreTrainedModel]:
    """The architecture's class, whose instances drop the experts' parameters while they are still on the meta device."""
    base = AutoModelForCausalLM._model_mapping[config_class]

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        for block in moe_blocks(self, family):
            experts = getattr(block, family.experts)
            for name in family.weights:
                experts.register_parameter(name, None)
            experts._is_hf_initialized = True  # nothing is left for transformers to initialise

    # The module name stays the base's: transformers reads its source to learn what the architecture supports.
    body = {"__init__": __init__, "__module__": base.__module__, "_keys_to_ignore_on_load_unexpected": [r"\.experts\."]}
    return type(base.__name__, (base,), body)


def _experts_forward(experts: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    return experts.offload_runtime.layer_call(experts.offload_layer, hidden, topk_ids, topk_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


def _begin(runtime: LayerServer) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        token_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        runtime.begin_forward(token_ids.reshape(-1), new_sequence=_begins_a_sequence(kwargs.get("past_key_values")))

    return hook


def _begins_a_sequence(cache: Any) -> bool:
    """A static cache has its length on the device, which a pass that a CUDA graph captures may not ask: such a pass decodes."""
    return cache is None or (not is_cuda_stream_capturing() and bool(cache.get_seq_length() == 0))


def _end(runtime: LayerServer) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        runtime.end_forward()

    return hook


def _capture_residual(runtime: LayerServer) -> Callable:
    def hook(norm: nn.Module, args: tuple) -> None:
        runtime.residual = args[0].reshape(-1, args[0].shape[-1])

    return hook


def _before_attention(runtime: LayerServer, layer: int) -> Callable:
    def hook(norm: nn.Module, args: tuple, output: Tensor) -> None:
        runtime.before_attention(layer, output.reshape(-1, output.shape[-1]))

    return hook


def _after_stack(runtime: LayerServer) -> Callable:
    def hook(decoder: nn.Module, args: tuple, output: Any) -> None:
        runtime.after_stack(output.last_hidden_state)

    return hook


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Loading prints a bar of its own, and warnings about expert weights it is told to leave out."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
