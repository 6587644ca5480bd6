"""Everything beside the plain expert MLP that a decode step launches: ours, what one would write in PyTorch, and what must be read.

An operation makes cases: both callables, the exact answer, and the weights that any implementation has to read.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, rms_norm

from kernels.device_cache import CachePlan
from kernels.gather_rows import gather_rows
from kernels.moe_call import MoECall, moe_mlp_reference
from kernels.moe_mlp import moe_mlp
from kernels.predict_corrected_gate import (
    CorrectedGateCall,
    CorrectedGateHead,
    predict_corrected_gate,
    predict_corrected_gate_reference,
)
from kernels.predict_mlp import MlpCall, MlpHead, ResidualBlock, predict_mlp, predict_mlp_reference
from kernels.quantised import QuantFormat
from kernels.quantised_experts import QuantisedGeometry, QuantisedTable
from kernels.route_and_predict import route_and_predict
from kernels.router_call import RouterCall, route_and_predict_reference
from kernels.routing import Routing
from kernels.slot_table import addresses_of
from scripts.gpu.case import Case, MakeCase
from scripts.gpu.plans import plan_case
from scripts.gpu.providers import distinct, generator
from scripts.gpu.shapes import MoEShape

FORMATS = (QuantFormat("int4", 64), QuantFormat("int8", 64), QuantFormat("fp8"), QuantFormat("mxfp4", 32))
MLP_WIDTH = 256  # PreScope's middle nets
RANK = 128  # of the corrected gate's two corrections together
READ_BYTES = 4096  # a row of the roof's


def operations() -> dict[str, MakeCase]:
    """By name; a maker returns None where the operation does not apply."""
    return timed_operations() | {"cache_plan": plan_case, "gather_rows": _gather_rows}


def timed_operations() -> dict[str, MakeCase]:
    """Those whose one call is a measurement: plans are timed in sequence, and row copies with the other transfers."""
    return {
        "router": _router(0),
        "router with 4 heads": _router(4),
        "predict_mlp": _predict_mlp,
        "predict_corrected_gate": _corrected_gate,
        **{f"experts in {how}": _quantised(how) for how in FORMATS},
    }


class _Random:
    """Unit-scale tensors from a seed."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int):
        self.dtype, self.device = dtype, device
        self.generator = generator(device, seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.empty(shape, device=self.device).normal_(generator=self.generator)
        return (drawn * scale).to(dtype or self.dtype)

    def matrix(self, n_out: int, n_in: int) -> Tensor:
        return self.normal(n_out, n_in, scale=n_in**-0.5)

    def routing(self, n_tokens: int, shape: MoEShape) -> tuple[Tensor, Tensor]:
        scores = torch.rand(n_tokens, shape.n_experts, generator=self.generator, device=self.device)
        weights, ids = scores.softmax(1).topk(shape.top_k)
        return ids.int(), weights / weights.sum(1, keepdim=True)


def _router(n_heads: int) -> MakeCase:
    def make(shape: MoEShape, n_tokens: int, dtype: torch.dtype, device: str, seed: int) -> Case:
        random = _Random(dtype, device, seed)
        weights = random.normal(1 + n_heads, shape.n_experts, shape.hidden, scale=shape.hidden**-0.5)
        n_guesses = shape.top_k if n_heads else 0
        call = RouterCall(random.normal(n_tokens, shape.hidden), weights, Routing(shape.top_k, renormalise=True), n_guesses)
        out = call.new_result()
        arrivals = torch.zeros((1 + n_heads) * call.n_blocks, dtype=torch.int32, device=device)

        def peer() -> object:
            logits = linear(call.x, weights.flatten(0, 1)).float().view(n_tokens, 1 + n_heads, -1)
            best = logits[:, 0].softmax(-1).topk(shape.top_k)
            return best.values / best.values.sum(-1, keepdim=True), logits[:, 1:].topk(shape.top_k)

        return Case(
            lambda: route_and_predict(call, out, arrivals).logits,
            lambda: route_and_predict_reference(call, torch.float64).logits,
            {"torch": peer},
            _whole(weights),
        )

    return make


def _predict_mlp(shape: MoEShape, n_tokens: int, dtype: torch.dtype, device: str, seed: int) -> Case:
    random = _Random(dtype, device, seed)
    single, width = torch.float32, MLP_WIDTH
    block = ResidualBlock(
        random.matrix(width, width),
        random.normal(width, dtype=single),
        random.matrix(width, width),
        random.normal(width, dtype=single),
    )
    head = MlpHead(
        random.matrix(2 * width, shape.hidden), random.normal(2 * width, dtype=single), random.normal(2, shape.n_experts, width),
        random.matrix(shape.n_experts, width), random.normal(shape.n_experts, dtype=single), block,
    )  # fmt: skip
    ids, weights = random.routing(n_tokens, shape)
    call = MlpCall(head, random.normal(n_tokens, shape.hidden), ids, weights)
    out, arrivals = call.new_result(shape.top_k), torch.zeros(n_tokens, dtype=torch.int32, device=device)
    selected = head.routing.index_select(1, distinct(ids))
    return Case(
        lambda: predict_mlp(call, out, arrivals).logits,
        lambda: predict_mlp_reference(call, shape.top_k, torch.float64).logits,
        {"torch": lambda: _mlp_in_torch(call, shape.top_k)},
        _whole(head.entry, selected, head.leave, block.enter, block.leave_transposed),
    )


def _mlp_in_torch(call: MlpCall, n_guesses: int) -> object:
    """The network as one would write it in PyTorch, with the entry folded as ours is."""
    head, x, ids = call.head, call.x, call.topk_ids
    assert head.block is not None
    v, s = linear(x, head.entry, head.entry_bias.to(x.dtype)).chunk(2, dim=1)
    features = head.routing[0][ids] + call.topk_weights.to(x.dtype)[..., None] * head.routing[1][ids]
    v, s = gelu(v + features.sum(1)), s.sigmoid()
    inner = gelu(linear(v, head.block.enter, head.block.enter_bias.to(x.dtype)))
    v = v + s * (inner @ head.block.leave_transposed + head.block.leave_bias.to(x.dtype))
    return linear(v, head.leave, head.leave_bias.to(x.dtype)).topk(n_guesses)


def _corrected_gate(shape: MoEShape, n_tokens: int, dtype: torch.dtype, device: str, seed: int) -> Case:
    random = _Random(dtype, device, seed)
    entry, correction = random.matrix(shape.n_experts + RANK, shape.hidden), random.matrix(shape.n_experts, RANK)
    norm = random.normal(shape.hidden).abs()
    call = CorrectedGateCall(CorrectedGateHead(norm, 1e-6, entry, correction), random.normal(n_tokens, shape.hidden))
    out, arrivals = call.new_result(shape.top_k), torch.zeros(n_tokens, dtype=torch.int32, device=device)

    def peer() -> object:
        both = linear(rms_norm(call.residual, (shape.hidden,), norm, 1e-6), entry)
        logits = both[:, : shape.n_experts] + linear(gelu(both[:, shape.n_experts :]), correction)
        return logits.topk(shape.top_k)

    return Case(
        lambda: predict_corrected_gate(call, out, arrivals).logits,
        lambda: predict_corrected_gate_reference(call, shape.top_k, torch.float64).logits,
        {"torch": peer},
        _whole(entry, correction),
    )


def _gather_rows(shape: MoEShape, n_tokens: int, dtype: torch.dtype, device: str, seed: int) -> Case | None:
    """One token's experts out of pinned memory, by the kernel."""
    if n_tokens > 1:
        return None
    n_rows, row_bytes = shape.top_k, shape.geometry(dtype).row_bytes
    rows = torch.randint(256, (n_rows, row_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    rows = rows.pin_memory() if device == "cuda" else rows
    slots, row_of = torch.zeros(n_rows, row_bytes, dtype=torch.uint8, device=device), addresses_of(rows)[None].to(device)
    plan = CachePlan.empty(torch.empty(1, n_rows, dtype=torch.int32, device=device), 0)
    plan.copy_keys.copy_(torch.arange(n_rows))
    plan.copy_slots.copy_(torch.arange(n_rows).flip(0))
    plan.copy_bounds.copy_(torch.tensor([0, n_rows, n_rows]))

    def ours() -> Tensor:
        gather_rows(slots, row_of, plan)
        return slots

    return Case(ours, lambda: rows.flip(0).to(device))


def _quantised(how: QuantFormat) -> MakeCase:
    def make(shape: MoEShape, n_tokens: int, dtype: torch.dtype, device: str, seed: int) -> Case | None:
        if how.group is not None and (shape.hidden % how.group or shape.intermediate % how.group):
            return None
        random, pool = _Random(dtype, device, seed), _quantised_pool(how, shape, dtype, device)
        geometry = QuantisedGeometry(shape.hidden, shape.intermediate, dtype, how=how)
        entries = torch.arange(shape.n_experts, dtype=torch.int32, device=device)[None]
        ids, weights = random.routing(n_tokens, shape)
        if n_tokens == 1:  # calls after each other read other experts, so that none is in L2
            ids = (torch.arange(shape.top_k, dtype=torch.int32, device=device)[None] + seed * shape.top_k) % shape.n_experts
        call = MoECall(random.normal(n_tokens, shape.hidden), ids, weights, QuantisedTable(geometry, (pool,), entries), 0)
        missed = torch.zeros(1, dtype=torch.int32, device=device)
        return Case(
            lambda: moe_mlp(call, missed=missed),
            lambda: moe_mlp_reference(call, torch.float64)[0],
            {},
            (pool, distinct(ids)),
        )

    return make


@lru_cache(maxsize=1)
def _quantised_pool(how: QuantFormat, shape: MoEShape, dtype: torch.dtype, device: str) -> Tensor:
    """uint8 [E, row_bytes]; k experts are quantised, and the others copies of them: quantising all takes longer than what is measured."""
    geometry, random = QuantisedGeometry(shape.hidden, shape.intermediate, dtype, how=how), _Random(dtype, device, 0)
    pool = torch.empty(shape.n_experts, geometry.row_bytes, dtype=torch.uint8, device=device)
    for expert, row in enumerate(pool if device != "meta" else ()):
        if expert < shape.top_k:
            geometry.pack(random.matrix(*geometry.gate_up_shape), random.matrix(*geometry.down_shape), row)
        else:
            row.copy_(pool[expert % shape.top_k])
    return pool


def _whole(*weights: Tensor) -> tuple[Tensor, Tensor]:
    """All bytes of `weights`, as rows that are read once each; the last is filled up."""
    parts = [part.contiguous().view(torch.uint8).flatten() for part in weights]
    parts.append(parts[0].new_zeros(-sum(map(len, parts)) % READ_BYTES))
    rows = torch.cat(parts).view(-1, READ_BYTES)
    return rows, torch.arange(len(rows), dtype=torch.int32, device=rows.device)
