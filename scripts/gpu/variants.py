"""What real models ask of the expert and router kernels beside the plain call: each variant on one small layer, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.decode_mlp import decode_mlp
from kernels.gated_activation import CLAMPED_SWIGLU
from kernels.grouped_mlp import grouped_mlp
from kernels.moe_call import MoECall, moe_mlp_reference
from kernels.read_only import read_rows, read_rows_reference
from kernels.route_and_predict import route_and_predict
from kernels.router_call import RouterCall, route_and_predict_reference
from kernels.routing import Routing
from kernels.slot_table import ExpertTable, addresses_of
from scripts.gpu.correctness import TOLERANCES, Verdict, compared, name_of
from scripts.gpu.forked import first_line
from scripts.gpu.parts import computed_in_parts
from scripts.gpu.providers import generator, make_problem
from scripts.gpu.shapes import MoEShape

LAYER = MoEShape("variants", hidden=128, n_experts=8, top_k=2, intermediate=64, n_layers=1)
TOKENS = 12
DTYPES = (torch.float32, torch.bfloat16)
KERNELS = {"decode": decode_mlp, "grouped": grouped_mlp}
GROUPS_OF_EXPERTS = Routing(2, "sigmoid", renormalise=True, scaling_factor=2.5, n_groups=4, n_kept_groups=2)  # as DeepSeek-V3


@dataclass(frozen=True)
class Variant:
    """A callable and its exact answer."""

    found: Callable[[], Tensor]
    exact: Callable[[], Tensor]


def variant_verdicts(device: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Verdict]:
    """Every variant."""
    for dtype in dtypes:
        for name, make in VARIANTS.items():
            try:
                variant = make(dtype, device)
                outcome = compared(variant.found, variant.exact(), TOLERANCES[dtype])
            except Exception as failure:  # belongs in the table like any other
                outcome = None, TOLERANCES[dtype], first_line(failure)
            yield Verdict(name, LAYER.name, TOKENS, name_of(dtype), *outcome)


def rehearse_variants() -> None:
    """Launch what `variant_verdicts` launches, on tensors without memory."""
    for dtype in DTYPES:
        for make in VARIANTS.values():
            make(dtype, "meta").found()


def _call(dtype: torch.dtype, device: str) -> MoECall:
    p = make_problem(LAYER, TOKENS, dtype, device, seed=1)
    return MoECall(p.x, p.ids, p.weights, p.table, 0)


def _normal(dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator(device, 2))


def _with_missed(kernel: Callable[..., Tensor], call: MoECall) -> Variant:
    """The output, and the flag behind it."""

    def found() -> Tensor:
        missed = torch.zeros(1, dtype=torch.int32, device=call.x.device)
        return torch.cat([kernel(call, missed=missed).flatten().double(), missed.double()])

    def exact() -> Tensor:
        out, missed = moe_mlp_reference(call, torch.float64)
        return torch.cat([out.flatten(), out.new_tensor([float(missed)])])

    return Variant(found, exact)


def _by_address(kernel: Callable[..., Tensor]) -> Callable[[torch.dtype, str], Variant]:
    def make(dtype: torch.dtype, device: str) -> Variant:
        call = _call(dtype, device)
        pool = call.table.pools[0]
        entries = torch.empty(1, len(pool), dtype=torch.int64, device=device)
        if device != "meta":
            entries.copy_(addresses_of(pool)[None])
        return _with_missed(kernel, replace(call, table=ExpertTable(call.table.geometry, (pool,), entries)))

    return make


def _gpt_oss(kernel: Callable[..., Tensor]) -> Callable[[torch.dtype, str], Variant]:
    def make(dtype: torch.dtype, device: str) -> Variant:
        biases = (_normal(dtype, device, LAYER.n_experts, n) for n in (2 * LAYER.intermediate, LAYER.hidden))
        gate_up_bias, down_bias = biases
        call = replace(_call(dtype, device), activation=CLAMPED_SWIGLU, gate_up_bias=gate_up_bias, down_bias=down_bias)
        return _with_missed(kernel, call)

    return make


def _shared(kernel: Callable[..., Tensor]) -> Callable[[torch.dtype, str], Variant]:
    def make(dtype: torch.dtype, device: str) -> Variant:
        shared, residual = _normal(dtype, device, 2, TOKENS, LAYER.hidden)
        return _with_missed(kernel, replace(_call(dtype, device), shared=shared, residual=residual))

    return make


def _absent(kernel: Callable[..., Tensor]) -> Callable[[torch.dtype, str], Variant]:
    """Every third expert is in no slot: zeros, and the flag."""

    def make(dtype: torch.dtype, device: str) -> Variant:
        call = _call(dtype, device)
        entries = call.table.entries.clone()
        entries[:, ::3] = -1
        return _with_missed(kernel, replace(call, table=ExpertTable(call.table.geometry, call.table.pools, entries)))

    return make


def _parts(n_tokens: int) -> Callable[[torch.dtype, str], Variant]:
    """Even pairs first, odd ones later: as few tokens or as many."""

    def make(dtype: torch.dtype, device: str) -> Variant:
        p = make_problem(LAYER, n_tokens, dtype, device, seed=3)
        call = MoECall(p.x, p.ids, p.weights, p.table, 0)

        cuts = [range(first, call.n_pairs, 2) for first in range(2)]
        return Variant(lambda: computed_in_parts(call, cuts), lambda: moe_mlp_reference(call, torch.float64)[0])

    return make


def _grouped_routing(n_tokens: int) -> Callable[[torch.dtype, str], Variant]:
    """Logits, then the weight of every expert, 0 where it was not chosen."""

    def make(dtype: torch.dtype, device: str) -> Variant:
        weights = _normal(dtype, device, 1, LAYER.n_experts, LAYER.hidden) * LAYER.hidden**-0.5
        bias = _normal(torch.float32, device, LAYER.n_experts)
        call = RouterCall(_normal(dtype, device, n_tokens, LAYER.hidden), weights, GROUPS_OF_EXPERTS, selection_bias=bias)

        def spread(ids: Tensor, chosen: Tensor) -> Tensor:
            return chosen.new_zeros(n_tokens, LAYER.n_experts).scatter(1, ids.long(), chosen)

        def found() -> Tensor:
            routed = route_and_predict(call)
            return torch.cat([routed.logits[0], spread(routed.topk_ids, routed.topk_weights)])

        def exact() -> Tensor:
            routed = route_and_predict_reference(call, torch.float64)
            return torch.cat([routed.logits[0], spread(routed.topk_ids, routed.topk_weights)])

        return Variant(found, exact)

    return make


def _read_only(dtype: torch.dtype, device: str) -> Variant:
    pool = make_problem(LAYER, 1, dtype, device, seed=4).table.pools[0]
    slots = torch.arange(0, LAYER.n_experts, 3, dtype=torch.int32, device=device)
    return Variant(lambda: read_rows(pool, slots), lambda: read_rows_reference(pool, slots).to(device))


VARIANTS: dict[str, Callable[[torch.dtype, str], Variant]] = {
    **{f"{name}, by address": _by_address(kernel) for name, kernel in KERNELS.items()},
    **{f"{name}, clamped and biased": _gpt_oss(kernel) for name, kernel in KERNELS.items()},
    **{f"{name}, shared and residual": _shared(kernel) for name, kernel in KERNELS.items()},
    **{f"{name}, absent experts": _absent(kernel) for name, kernel in KERNELS.items()},
    "in parts, 1 token": _parts(1),
    "in parts, 12 tokens": _parts(TOKENS),
    "router, groups of experts, 1 token": _grouped_routing(1),
    "router, groups of experts, 12 tokens": _grouped_routing(TOKENS),
    "read_only": _read_only,
}
