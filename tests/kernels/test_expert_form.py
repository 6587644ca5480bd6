"""Experts with biases and another gate: the CPU path against the reference of the kernels, alone and together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.expert_form import PLAIN, ExpertForm
from kernels.expert_mlp import expert_mlp
from kernels.gated_activation import CLAMPED_SWIGLU
from kernels.moe_call import moe_mlp_reference
from tests.kernels.random_moe import Sizes, random_call

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", LIMITS)
@given(seed=st.integers(0, 99), tokens=st.integers(1, 9), hidden=st.integers(8, 40), inner=st.integers(1, 40))
def test_each_expert_is_the_equation(dtype: torch.dtype, seed: int, tokens: int, hidden: int, inner: int) -> None:
    """Against the kernels' reference in float64, with one expert a token and a weight of 1."""
    sizes = Sizes(tokens, hidden, inner, 4, 1)
    call = random_call(sizes, dtype, seed=seed, biases=True, activation=CLAMPED_SWIGLU)
    call.weights.fill_(1)
    form = ExpertForm(call.activation, call.gate_up_bias, call.down_bias)
    expected, _ = moe_mlp_reference(call, torch.float64)
    for token, expert in enumerate(call.ids[:, 0].tolist()):
        weights = call.table.expert(call.layer, expert)
        assert weights is not None
        found = form.mlp(expert, call.x[token : token + 1], *weights)[0]
        assert found.dtype == dtype
        assert (found.double() - expected[token]).norm() <= LIMITS[dtype] * (1 + expected[token].norm())


def test_several_experts_have_the_bits_of_each_alone() -> None:
    random = torch.Generator().manual_seed(0)
    biases = torch.randn(5, 24, generator=random), torch.randn(5, 16, generator=random)
    form = ExpertForm(CLAMPED_SWIGLU, *biases)
    xs = [torch.randn(n, 16, generator=random) for n in (1, 4, 2)]
    weights = [(torch.randn(24, 16, generator=random), torch.randn(16, 12, generator=random)) for _ in xs]
    operands = [(gate_up.t(), down.t()) for gate_up, down in weights]
    for expert, x, weight, rows in zip([4, 0, 2], xs, weights, form.mlps([4, 0, 2], xs, operands), strict=True):
        assert torch.equal(rows, form.mlp(expert, x, *weight))


def test_the_plain_form_is_the_plain_mlp() -> None:
    x, gate_up, down = torch.randn(3, 16), torch.randn(24, 16), torch.randn(16, 12)
    assert PLAIN.is_plain and torch.equal(PLAIN.mlp(7, x, gate_up, down), expert_mlp(x, gate_up, down))
    assert not ExpertForm(CLAMPED_SWIGLU).is_plain
