"""A layer call in parts has the bits of the same call in one part, and is right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.moe_mlp import choose_path
from kernels.moe_parts import MoEParts
from kernels.quantised import QuantFormat
from tests.kernels.random_moe import Sizes, check_result, quantised_call, random_call


@st.composite
def cut_calls(draw: st.DrawFn) -> tuple[Sizes, list[int]]:
    """A call's sizes, and for each of its pairs the part that computes it."""
    n_experts = draw(st.integers(1, 7))
    n_tokens, top_k = draw(st.sampled_from([1, 2, 3, 24])), draw(st.integers(1, n_experts))
    sizes = Sizes(n_tokens, draw(st.integers(8, 70)), draw(st.integers(1, 40)), n_experts, top_k, n_absent=0)
    n_pairs = n_tokens * top_k
    return sizes, draw(st.lists(st.integers(0, 2), min_size=n_pairs, max_size=n_pairs))


@given(cut_calls(), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_parts_have_the_bits_of_the_whole(
    cut: tuple[Sizes, list[int]], dtype: torch.dtype, by_address: bool, seed: int
) -> None:
    sizes, part_of = cut
    call = random_call(sizes, dtype, seed, by_address=by_address)
    missed = torch.zeros(1, dtype=torch.int32)
    whole, parts = MoEParts(call, missed), MoEParts(call, missed)
    whole.add(torch.arange(call.n_pairs))
    parts.rows.fill_(torch.nan)
    for part in range(3):
        pairs = torch.tensor([pair for pair in range(call.n_pairs) if part_of[pair] == part], dtype=torch.int64)
        if len(pairs):
            parts.add(pairs)
    out = parts.finish()
    assert torch.equal(out, whole.finish())
    check_result(call, out, missed)


@pytest.mark.parametrize("n_tokens", [1, 24])
def test_pairs_left_out_are_added_by_others(n_tokens: int) -> None:
    call = random_call(Sizes(n_tokens, 32, 16, 6, 2, n_absent=0), torch.float32, 0)
    assert choose_path(n_tokens, 6, 2) == ("decode" if n_tokens == 1 else "grouped")
    whole, parts = (MoEParts(call, torch.zeros(1, dtype=torch.int32)) for _ in range(2))
    pairs = torch.arange(call.n_pairs)
    whole.add(pairs)
    parts.rows.fill_(torch.nan)
    parts.add(pairs[::2])
    parts.leave_out(pairs[1::2])
    others = whole.rows.view(n_tokens, 2, -1)[:, 1] * call.weights[:, 1:]
    torch.testing.assert_close(parts.finish(shared=others), whole.finish(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 24])
def test_quantised_experts_in_parts(n_tokens: int) -> None:
    call = quantised_call(Sizes(n_tokens, 64, 32, 6, 2), QuantFormat("int4", 32), torch.bfloat16, seed=1, by_address=True)
    missed = torch.zeros(1, dtype=torch.int32)
    whole, parts = MoEParts(call, missed), MoEParts(call, missed)
    whole.add(torch.arange(call.n_pairs))
    parts.rows.fill_(torch.nan)
    parts.add(torch.arange(0, call.n_pairs, 2))
    parts.add(torch.arange(1, call.n_pairs, 2))
    out = parts.finish()
    assert torch.equal(out, whole.finish())
    check_result(call, out, missed)


def test_an_absent_expert_raises_the_flag() -> None:
    call = random_call(Sizes(1, 32, 16, 4, 4, n_absent=2), torch.float32, 0)
    missed = torch.zeros(1, dtype=torch.int32)
    MoEParts(call, missed).add(torch.arange(4))
    assert int(missed) == 1
