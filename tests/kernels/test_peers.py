"""What expert kernels are measured against must itself be right: the sorted-and-padded design, and the kernel that only reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.read_only import CHUNK_WORDS, read_rows, read_rows_reference
from kernels.sorted_padded_mlp import aligned, sorted_padded_mlp
from prefetch.errors import KernelInputError

TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def by_definition(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for rank, expert in enumerate(ids[token].tolist()):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            y = torch.nn.functional.silu(gate) * up
            out[token] += weights[token, rank].double() * (down[expert].double() @ y)
    return out


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("n_tokens", "n_experts", "top_k"), [(1, 7, 3), (5, 4, 4), (9, 5, 2)])
def test_the_serving_design_computes_the_same(n_tokens: int, n_experts: int, top_k: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(n_tokens)
    hidden, inner = 72, 40

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) / shape[-1] ** 0.5).to(dtype)

    x, gate_up, down = (
        normal(n_tokens, hidden) * hidden**0.5,
        normal(n_experts, 2 * inner, hidden),
        normal(n_experts, hidden, inner),
    )
    ids = torch.rand(n_tokens, n_experts, generator=random).argsort(1)[:, :top_k].contiguous()
    weights = torch.rand(n_tokens, top_k, generator=random).softmax(1).to(dtype)
    found, expected = sorted_padded_mlp(x, ids, weights, gate_up, down).double(), by_definition(x, ids, weights, gate_up, down)
    assert float((found - expected).norm() / expected.norm()) <= TOLERANCES[dtype]


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99), st.sampled_from([2, 16]))
@settings(deadline=None)
def test_every_pair_has_one_place_in_a_tile_of_its_expert(n_tokens: int, n_experts: int, k: int, seed: int, rows: int) -> None:
    top_k = min(k, n_experts)
    random = torch.Generator().manual_seed(seed)
    ids = torch.rand(n_tokens, n_experts, generator=random).argsort(1)[:, :top_k]
    order, expert_of_tile = aligned(ids, n_experts, rows)
    n_pairs = ids.numel()
    placed = order[order < n_pairs]
    assert placed.sort().values.tolist() == list(range(n_pairs))
    for tile, expert in enumerate(expert_of_tile.tolist()):
        inside = order[tile * rows : (tile + 1) * rows]
        assert all(ids.reshape(-1)[pair] == expert for pair in inside[inside < n_pairs])


def test_the_roof_reads_every_word_once() -> None:
    random = torch.Generator().manual_seed(0)
    pool = torch.randint(256, (5, 4 * (CHUNK_WORDS + 96)), generator=random, dtype=torch.uint8)
    slots = torch.tensor([4, 0, 2], dtype=torch.int32)
    assert torch.equal(read_rows(pool, slots), read_rows_reference(pool, slots))


def test_bad_arguments_are_named() -> None:
    x, ids, weights = torch.zeros(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with pytest.raises(KernelInputError, match="down has shape"):
        sorted_padded_mlp(x, ids, weights, torch.zeros(3, 8, 8), torch.zeros(3, 8, 5))
    with pytest.raises(KernelInputError, match="slots is int64, expected int32"):
        read_rows(torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
