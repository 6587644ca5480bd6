"""Everybody who can compute the expert part of an MoE layer, behind one call: PyTorch, transformers, the serving design, ours.

Each provider gets its weights in the layout it wants, made before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, silu
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from kernels.decode_mlp import decode_mlp
from kernels.grouped_mlp import grouped_mlp
from kernels.moe_call import MoECall
from kernels.moe_mlp import moe_mlp
from kernels.slot_table import ExpertTable
from kernels.sorted_padded_mlp import sorted_padded_mlp
from scripts.gpu.shapes import MoEShape


@dataclass(frozen=True)
class Problem:
    """One layer call: T tokens routed over one set of weights, in the pool's layout and as plain tensors of their own."""

    x: Tensor  # [T, H]
    ids: Tensor  # int64 [T, k]
    weights: Tensor  # [T, k], of x's dtype
    table: ExpertTable  # one layer of E experts, all present
    gate_up: Tensor  # [E, 2I, H], contiguous
    down: Tensor  # [E, H, I], contiguous


Call = Callable[[], Tensor]
Prepare = Callable[[Problem], Call]  # what happens here happens before the clock starts


def make_problem(shape: MoEShape, n_tokens: int, dtype: torch.dtype, device: str, seed: int) -> Problem:
    """Unit-scale random weights, uniform random routing. Takes twice the layer's weights in memory: both layouts."""
    random = generator(device, seed)
    n_experts, geometry = shape.n_experts, shape.geometry(dtype)
    pool = torch.empty(n_experts, geometry.row_bytes, dtype=torch.uint8, device=device)
    entries = torch.arange(n_experts, dtype=torch.int32, device=device)[None]
    table = ExpertTable(geometry, (pool,), entries)
    gate_up = torch.empty(n_experts, *geometry.gate_up_shape, dtype=dtype, device=device)
    down = torch.empty(n_experts, *geometry.down_shape, dtype=dtype, device=device)
    for expert in range(n_experts if device != "meta" else 0):
        for source, target in zip((gate_up[expert], down[expert]), _row(table, expert), strict=True):
            source.normal_(generator=random).mul_(source.shape[1] ** -0.5)
            target.copy_(source)
    x = torch.empty(n_tokens, shape.hidden, dtype=dtype, device=device).normal_(generator=random)
    scores = torch.rand(n_tokens, n_experts, generator=random, device=device)
    weights, ids = scores.softmax(1).topk(shape.top_k)
    return Problem(x, ids, (weights / weights.sum(1, keepdim=True)).to(dtype), table, gate_up, down)


def torch_loop(p: Problem) -> Tensor:
    """One expert at a time; asks the device which are touched."""
    return _expert_by_expert(p, p.x.dtype)


def reference(p: Problem) -> Tensor:
    """The same, all arithmetic in fp32: what timed results are compared with."""
    return _expert_by_expert(p, torch.float32)


def _expert_by_expert(p: Problem, dtype: torch.dtype) -> Tensor:
    x, weights = p.x.to(dtype), p.weights.to(dtype)
    out = torch.zeros_like(x)
    for expert in p.ids.unique().tolist():
        token, rank = torch.where(p.ids == expert)
        gate, up = linear(x[token], p.gate_up[expert].to(dtype)).chunk(2, dim=-1)
        out.index_add_(0, token, linear(silu(gate) * up, p.down[expert].to(dtype)) * weights[token, rank, None])
    return out


def torch_grouped(p: Problem) -> Tensor:
    """`torch.nn.functional.grouped_mm` on tokens sorted by expert."""
    flat = p.ids.reshape(-1)
    order = flat.argsort(stable=True)
    ends = (flat[:, None] == torch.arange(len(p.gate_up), device=flat.device)).sum(0).cumsum(0).int()
    both = grouped_mm(p.x[order // p.ids.shape[1]], p.gate_up.transpose(1, 2), offs=ends)
    gate, up = both.chunk(2, dim=-1)
    rows = grouped_mm(silu(gate) * up, p.down.transpose(1, 2), offs=ends) * p.weights.reshape(-1, 1)[order]
    return torch.empty_like(rows).index_copy_(0, order, rows).view(*p.ids.shape, -1).sum(1)


def as_is(run: Callable[[Problem], Tensor]) -> Prepare:
    """A provider with nothing to prepare."""
    return lambda p: lambda: run(p)


def from_transformers(implementation: str) -> Prepare:
    """transformers' own experts module with one of its implementations."""

    def prepare(p: Problem) -> Call:
        experts = _experts(p, implementation)
        return lambda: experts(p.x, p.ids, p.weights)

    return prepare


def ours(kernel: Callable[..., Tensor]) -> Prepare:
    """One of this project's kernels, through the slot table."""

    def prepare(p: Problem) -> Call:
        call = MoECall(p.x, p.ids, p.weights, p.table, 0)
        missed = torch.zeros(1, dtype=torch.int32, device=p.x.device)  # one for all calls, as in the runtime
        return lambda: kernel(call, missed=missed)

    return prepare


OURS = {"ours_decode": ours(decode_mlp), "ours_grouped": ours(grouped_mlp), "ours": ours(moe_mlp)}
PEERS: dict[str, Prepare] = {
    "sorted_padded": as_is(lambda p: sorted_padded_mlp(p.x, p.ids, p.weights, p.gate_up, p.down)),
    "torch_grouped_mm": as_is(torch_grouped),
    "transformers_grouped_mm": from_transformers("grouped_mm"),
    "transformers_batched_mm": from_transformers("batched_mm"),
    "transformers_eager": from_transformers("eager"),
    "torch_loop": as_is(torch_loop),
}
PROVIDERS = OURS | PEERS  # ours first: a peer that breaks the process must not take our times along


def generator(device: str, seed: int) -> torch.Generator | None:
    """Random numbers from `seed`; none where tensors have no memory."""
    return None if device == "meta" else torch.Generator(device).manual_seed(seed)


def distinct(ids: Tensor) -> Tensor:
    """int32, the distinct experts of `ids`; of a tensor without memory, as many as there are pairs."""
    return (ids.flatten() if ids.is_meta else ids.unique()).int()


def _experts(p: Problem, implementation: str) -> Qwen3MoeExperts:
    n_experts, twice_inner, hidden = p.gate_up.shape
    config: Any = SimpleNamespace(
        num_experts=n_experts,
        hidden_size=hidden,
        moe_intermediate_size=twice_inner // 2,
        hidden_act="silu",
        _experts_implementation=implementation,
    )
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(p.gate_up, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(p.down, requires_grad=False)
    return experts


def _row(table: ExpertTable, expert: int) -> tuple[Tensor, Tensor]:
    found = table.expert(0, expert)
    assert found is not None
    return found
