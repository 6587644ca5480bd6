"""The expert MLP against float64 from the same rounded weights."""

from collections.abc import Sequence
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.expert_mlp import SMALL_ELEMENTS, STACKED_AT_ONCE, WIDENED_ROWS, expert_mlp, expert_mlps, weighted_sum
from prefetch.dispatch import dispatch

N_ROUNDINGS = 12  # gate, up, silu, their product, the result: each at most half a unit; the rest for the sums
LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def reference(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ down.double().T


def uncancelled(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """What the sums of a few random terms would be did they not cancel: rounding is relative to this, not to what is left.
    It grows as the root of the number of terms, as sums of random signs do, so that it stays close to the result itself."""
    x, gate_up, down = x.double(), gate_up.double(), down.double()
    gate, up = (x.square() @ gate_up.square().T).sqrt().chunk(2, dim=-1)
    return ((gate * up).square() @ down.square().T).sqrt()


@pytest.mark.parametrize("dtype", LIMITS)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 17), hidden=st.integers(1, 97), inner=st.integers(1, 47), seed=st.integers(0, 2**16))
def test_expert_mlp(dtype: torch.dtype, n: int, hidden: int, inner: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, hidden, generator=random).to(dtype)
    gate_up = (torch.randn(2 * inner, hidden, generator=random) / hidden**0.5).to(dtype)
    down = (torch.randn(hidden, inner, generator=random) / inner**0.5).to(dtype)
    error = (expert_mlp(x, gate_up, down).double() - reference(x, gate_up, down)).norm()
    scale = uncancelled(x, gate_up, down).norm()
    underflow = torch.finfo(dtype).tiny * (n * hidden * inner) ** 0.5  # below it numbers lose digits (fp16: 6e-5)
    assert error <= N_ROUNDINGS * torch.finfo(dtype).eps / 2 * scale + underflow


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("n_tokens", [1, 2, 33])
def test_weighted_sum(dtype: torch.dtype, n_tokens: int) -> None:
    random = torch.Generator().manual_seed(n_tokens)
    rows = torch.randn(n_tokens, 4, 50, generator=random).to(dtype)
    weights = torch.rand(n_tokens, 4, generator=random).to(dtype)
    exact = (rows.double() * weights.double()[..., None]).sum(1)
    assert relative_error(weighted_sum(rows, weights), exact) <= LIMITS[dtype]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(4, 9), st.integers(0, 2**16))
def test_dispatch_puts_every_pair_with_its_expert_once(n_tokens: int, top_k: int, n_experts: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(n_experts, generator=random)[:top_k] for _ in range(n_tokens)])
    work = dispatch(ids)
    assert work.experts == list(dict.fromkeys(ids.flatten().tolist()))
    assert sorted(pair for pairs in work.pairs.values() for pair in pairs) == list(range(n_tokens * top_k))
    for expert, pairs in work.pairs.items():
        assert pairs == (ids.flatten() == expert).nonzero()[:, 0].tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(4, 9), st.randoms(use_true_random=False))
def test_states_go_out_and_rows_come_back(n_tokens: int, top_k: int, n_experts: int, order: Random) -> None:
    """Experts that scale by their own number, computed in any order: the sum is that of a loop over tokens and ranks."""
    random = torch.Generator().manual_seed(order.getrandbits(16))
    ids = torch.stack([torch.randperm(n_experts, generator=random)[:top_k] for _ in range(n_tokens)])
    hidden, weights = torch.randn(n_tokens, 5, generator=random), torch.rand(n_tokens, top_k, generator=random)
    work = dispatch(ids)
    inputs = work.inputs(hidden)
    out = work.combine({e: inputs[e] * (e + 1) for e in order.sample(work.experts, len(work.experts))}, weights)
    for token in range(n_tokens):
        scale = sum(float(weights[token, rank]) * (int(ids[token, rank]) + 1) for rank in range(top_k))
        torch.testing.assert_close(out[token], hidden[token] * scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", [192, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_widened_or_in_a_batch_or_alone_the_mlp_is_the_same(dtype: torch.dtype, hidden: int) -> None:
    """One case on either side of the size below which experts are small, at row counts on either side of widening as well."""
    random = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(hidden, hidden, generator=random) / hidden**0.5).to(dtype)
    down = (torch.randn(hidden, hidden // 2, generator=random) / (hidden / 2) ** 0.5).to(dtype)
    x = torch.randn(WIDENED_ROWS + 1, hidden, generator=random).to(dtype)
    exact = reference(x, gate_up, down)
    assert relative_error(expert_mlp(x, gate_up, down), exact) <= LIMITS[dtype]
    assert relative_error(expert_mlp(x[:-1], gate_up, down), exact[:-1]) <= LIMITS[dtype]
    assert (gate_up.numel() < SMALL_ELEMENTS) == (hidden == 192)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_more_experts_than_a_batch_holds(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    n_experts, n = 2 * STACKED_AT_ONCE + 1, WIDENED_ROWS + 1
    weights = [
        (torch.randn(64, 48, generator=random).to(dtype), torch.randn(48, 32, generator=random).to(dtype))
        for _ in range(n_experts)
    ]
    check_same_bits(torch.randn(n_experts * n, 48, generator=random).to(dtype).split(n), weights, n_threads=1)


@pytest.mark.parametrize("dtype", LIMITS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.sampled_from([1, 2, 3, 8, 20]), min_size=1, max_size=7),
    hidden=st.integers(1, 97),
    inner=st.sampled_from([1, 5, 16, 33, 64, 96]),
    n_threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)
def test_experts_together_have_the_bits_of_experts_apart(
    dtype: torch.dtype, rows: list[int], hidden: int, inner: int, n_threads: int, seed: int
) -> None:
    """Which experts are computed together depends on which have arrived: no bit of the result may."""
    random = torch.Generator().manual_seed(seed)
    weights = [
        (torch.randn(2 * inner, hidden, generator=random).to(dtype), torch.randn(hidden, inner, generator=random).to(dtype))
        for _ in rows
    ]
    xs = torch.randn(sum(rows), hidden, generator=random).to(dtype).split(rows)
    check_same_bits(xs, weights, n_threads)


def test_activations_of_many_rows_are_not_cut_among_threads() -> None:
    random = torch.Generator().manual_seed(0)
    weights = [(torch.randn(1056, 24, generator=random), torch.randn(24, 528, generator=random)) for _ in range(3)]
    check_same_bits(torch.randn(270, 24, generator=random).split([50, 61, 159]), weights, n_threads=2)


def test_no_experts_give_no_rows() -> None:
    assert expert_mlps([], []) == []


def check_same_bits(xs: Sequence[torch.Tensor], weights: list[tuple[torch.Tensor, torch.Tensor]], n_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        together = expert_mlps(xs, [(gate_up.t(), down.t()) for gate_up, down in weights])
        assert len(together) == len(xs)
        assert all(torch.equal(rows, expert_mlp(x, *weight)) for rows, x, weight in zip(together, xs, weights, strict=True))
    finally:
        torch.set_num_threads(before)
