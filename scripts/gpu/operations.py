"""Everything beside the plain expert MLP that a decode step launches: ours, what one would write in PyTorch, and what must be read.

An `Operation` makes problems; a problem has both callables, the exact answer, and the weights that any implementation has to read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from kernels.cache_plan import cache_plan, cache_plan_reference
from kernels.device_cache import CachePlan, DeviceCache, slru_protected
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
from scripts.gpu.shapes import MoEShape

MLP_WIDTH = 256  # PreScope's middle nets
RANK = 128  # of the corrected gate's two corrections together
CACHE_SLOTS = 1228  # 12 GB of Qwen3-30B-A3B's experts in bf16
MAX_PLANNED_PAIRS = 64  # the planner is sequential, and meant for decode


@dataclass(frozen=True)
class Case:
    """One call. Callables return what is compared: logits, the layer's output, or a cache's books."""

    ours: Callable[[], Tensor]
    exact: Callable[[], Tensor]  # in float64, or integers
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)  # what others offer, in the weights' dtype
    reads: Tensor | None = (
        None  # uint8 [rows, bytes], what any implementation reads from memory; None where that is next to nothing
    )


MakeCase = Callable[[MoEShape, int, torch.dtype, str, int], Case | None]


def operations() -> dict[str, MakeCase]:
    """By name; a maker returns None where the operation does not apply."""
    return {
        "router": _router(0),
        "router with 4 heads": _router(4),
        "predict_mlp": _predict_mlp,
        "predict_corrected_gate": _corrected_gate,
        "cache_plan": _cache_plan,
        "gather_rows": _gather_rows,
        **{
            f"experts in {how}": _quantised(how)
            for how in (QuantFormat("int4", 64), QuantFormat("int8", 64), QuantFormat("fp8"), QuantFormat("mxfp4", 32))
        },
    }


class _Random:
    """Unit-scale tensors from a seed."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

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
            _as_rows(weights),
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
    return Case(
        lambda: predict_mlp(call, out, arrivals).logits,
        lambda: predict_mlp_reference(call, shape.top_k, torch.float64).logits,
        {"torch": lambda: predict_mlp_reference(call, shape.top_k, dtype)},
        _as_rows(head.entry),
    )


def _corrected_gate(shape: MoEShape, n_tokens: int, dtype: torch.dtype, device: str, seed: int) -> Case:
    random = _Random(dtype, device, seed)
    entry, correction = random.matrix(shape.n_experts + RANK, shape.hidden), random.matrix(shape.n_experts, RANK)
    norm = random.normal(shape.hidden).abs()
    call = CorrectedGateCall(CorrectedGateHead(norm, 1e-6, entry, correction), random.normal(n_tokens, shape.hidden))
    out, arrivals = call.new_result(shape.top_k), torch.zeros(n_tokens, dtype=torch.int32, device=device)

    def peer() -> object:
        both = linear(rms_norm(call.residual, (shape.hidden,), norm, 1e-6), entry)
        logits = both[:, : shape.n_experts] + linear(both[:, shape.n_experts :], correction)
        return logits.topk(shape.top_k)

    return Case(
        lambda: predict_corrected_gate(call, out, arrivals).logits,
        lambda: predict_corrected_gate_reference(call, shape.top_k, torch.float64).logits,
        {"torch": peer},
        _as_rows(entry),
    )


def _cache_plan(shape: MoEShape, n_tokens: int, dtype: torch.dtype, device: str, seed: int) -> Case | None:
    """A plan over a full cache with two layers' predictions; it changes the books, and every replay plans on."""
    if n_tokens * shape.top_k > MAX_PLANNED_PAIRS:
        return None
    random = _Random(torch.float32, device, seed)
    n_slots = min(CACHE_SLOTS, shape.n_layers * shape.n_experts * 3 // 4)
    spare = min(MAX_PLANNED_PAIRS, n_slots // 4)
    capacity = n_slots - 2 * spare

    def empty() -> DeviceCache:
        return DeviceCache.empty(
            shape.n_layers, shape.n_experts, capacity=capacity, staging=spare, transient=spare,
            protected_capacity=slru_protected(capacity), device=device,
        )  # fmt: skip

    ids, _ = random.routing(n_tokens, shape)
    predicted = torch.stack([random.routing(1, shape)[0][0] for _ in range(min(2, shape.n_layers))])
    cache = empty()
    plan = CachePlan.empty(ids, predicted.numel())

    def ours() -> Tensor:
        return _books(cache, cache_plan(cache, 0, ids, predicted, plan))

    def exact() -> Tensor:
        expected = empty()
        return _books(expected, cache_plan_reference(expected, 0, ids, predicted))

    return Case(ours, exact, _flashlib(shape, ids, n_slots))


def _books(cache: DeviceCache, plan: CachePlan) -> Tensor:
    """All that a plan decides, int64, in one tensor; entries of the copy list past its end are undefined and set to 0."""
    listed = torch.arange(len(plan.copy_keys), device=plan.copy_keys.device) < plan.copy_bounds[2]
    copies = (torch.where(listed, entries, 0) for entries in (plan.copy_keys, plan.copy_slots))
    state = cache.tensors
    return torch.cat([part.flatten().long() for part in (*state, plan.slot_ids, plan.copy_bounds, *copies)])


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


def _flashlib(shape: MoEShape, ids: Tensor, n_slots: int) -> dict[str, Callable[[], object]]:
    """flashlib 0.4's LRU admission (Apache-2.0) over as many slots, where that package is installed: plain LRU, no predictions."""
    try:
        from flashlib.kernels.slot_cache.triton.lru_ensure import lru_ensure
    except ImportError:
        return {}
    integers: dict[str, Any] = {"dtype": torch.int32, "device": ids.device}
    query = ids.flatten().contiguous()  # of layer 0: expert ids are keys
    slot_of = torch.full((shape.n_layers * shape.n_experts,), -1, **integers)
    key_of, used = torch.full((n_slots,), -1, **integers), torch.zeros(n_slots, **integers)
    step, slots = torch.zeros((), **integers), torch.empty_like(query)
    source, target = torch.empty_like(query), torch.empty_like(query)
    n_copies = torch.zeros((), dtype=torch.int64, device=ids.device)
    return {"flashlib lru_ensure": lambda: lru_ensure(query, slot_of, key_of, used, step, slots, source, target, n_copies)}


def _quantised(how: QuantFormat) -> MakeCase:
    def make(shape: MoEShape, n_tokens: int, dtype: torch.dtype, device: str, seed: int) -> Case | None:
        if how.group is not None and (shape.hidden % how.group or shape.intermediate % how.group):
            return None
        random = _Random(dtype, device, seed)
        geometry = QuantisedGeometry(shape.hidden, shape.intermediate, dtype, how=how)
        pool = torch.empty(shape.n_experts, geometry.row_bytes, dtype=torch.uint8, device=device)
        for expert, row in enumerate(pool):
            if expert < shape.top_k:
                geometry.pack(random.matrix(*geometry.gate_up_shape), random.matrix(*geometry.down_shape), row)
            else:  # quantising every one takes longer than all that is measured
                row.copy_(pool[expert % shape.top_k])
        entries = torch.arange(shape.n_experts, dtype=torch.int32, device=device)[None]
        ids, weights = random.routing(n_tokens, shape)
        call = MoECall(random.normal(n_tokens, shape.hidden), ids, weights, QuantisedTable(geometry, (pool,), entries), 0)
        return Case(
            lambda: moe_mlp(call),
            lambda: moe_mlp_reference(call, torch.float64)[0],
            {},
            pool[ids.unique().long()].contiguous(),
        )

    return make


def _as_rows(weights: Tensor) -> Tensor:
    return weights.contiguous().view(torch.uint8).view(-1, weights.shape[-1] * weights.element_size())
