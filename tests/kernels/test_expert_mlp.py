"""The expert MLP against float64 from the same rounded weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.expert_mlp import expert_mlp, weighted_sum
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
    if work.pairs is None or work.tokens is None:
        assert n_tokens == 1
        return
    assert sorted(torch.cat([work.pairs[e] for e in work.experts]).tolist()) == list(range(n_tokens * top_k))
    for expert in work.experts:
        assert (ids.flatten()[work.pairs[expert]] == expert).all()
        assert work.tokens[expert].tolist() == sorted((work.pairs[expert] // top_k).tolist())
