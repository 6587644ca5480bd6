"""A layer call in parts has the bits of the same call in one part, and is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.moe_call import MoECall
from kernels.moe_mlp import choose_path
from kernels.moe_parts import DecodedParts, MoEParts, Part, PartKernels
from kernels.quantised import QuantFormat
from kernels.slot_table import addresses_of
from prefetch.errors import KernelInputError
from tests.kernels.random_moe import Sizes, check_result, quantised_call, random_call


def address_table(call: MoECall) -> torch.Tensor:
    """int64 [E], of the call's layer."""
    entries = call.table.entries[call.layer]
    if call.table.by_address:
        return entries
    return torch.where(entries < 0, 0, addresses_of(call.table.pools[0])[entries.clamp(min=0).long()])


def kernels_of(call: MoECall, missed: torch.Tensor) -> PartKernels:
    nothing = torch.zeros(1, call.table.n_experts, dtype=torch.int64)
    return PartKernels(replace(call.table, entries=nothing), missed)


def begun(call: MoECall, missed: torch.Tensor) -> MoEParts:
    return kernels_of(call, missed).begin(call.x, call.ids, call.weights)


def part_of(call: MoECall, pairs: Sequence[int]) -> Part:
    """`pairs` as the host sends them."""
    chosen = torch.tensor(pairs)
    ids = call.ids.view(-1)[chosen].long()
    first = pairs[0] if list(pairs) == list(range(pairs[0], pairs[0] + len(pairs))) else None
    return Part(address_table(call), ids, chosen, chosen // call.top_k, len(pairs), first)


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
    sizes, number_of = cut
    call = random_call(sizes, dtype, seed, by_address=by_address)
    missed = torch.zeros(1, dtype=torch.int32)
    whole, parts = begun(call, missed), begun(call, missed)
    whole.add(part_of(call, range(call.n_pairs)))
    parts.rows.fill_(torch.nan)
    for number in range(3):
        pairs = [pair for pair in range(call.n_pairs) if number_of[pair] == number]
        if pairs:
            parts.add(part_of(call, pairs))
    out = parts.finish()
    assert torch.equal(out, whole.finish())
    check_result(call, out, missed)


@pytest.mark.parametrize("n_tokens", [1, 24])
def test_pairs_left_out_are_added_by_others(n_tokens: int) -> None:
    call = random_call(Sizes(n_tokens, 32, 16, 6, 2, n_absent=0), torch.float32, 0)
    assert choose_path(n_tokens, 6, 2) == ("decode" if n_tokens == 1 else "grouped")
    whole, parts = (begun(call, torch.zeros(1, dtype=torch.int32)) for _ in range(2))
    pairs = range(call.n_pairs)
    whole.add(part_of(call, pairs))
    parts.rows.fill_(torch.nan)
    parts.add(part_of(call, pairs[::2]))
    parts.leave_out(torch.tensor(pairs[1::2]))
    others = whole.rows.view(n_tokens, 2, -1)[:, 1] * call.weights[:, 1:]
    torch.testing.assert_close(parts.finish(shared=others), whole.finish(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 24])
def test_quantised_experts_in_parts(n_tokens: int) -> None:
    call = quantised_call(Sizes(n_tokens, 64, 32, 6, 2), QuantFormat("int4", 32), torch.bfloat16, seed=1, by_address=True)
    missed = torch.zeros(1, dtype=torch.int32)
    whole, parts = begun(call, missed), begun(call, missed)
    whole.add(part_of(call, range(call.n_pairs)))
    parts.rows.fill_(torch.nan)
    parts.add(part_of(call, range(0, call.n_pairs, 2)))
    parts.add(part_of(call, range(1, call.n_pairs, 2)))
    out = parts.finish()
    assert torch.equal(out, whole.finish())
    check_result(call, out, missed)


def test_an_absent_expert_raises_the_flag() -> None:
    call = random_call(Sizes(1, 32, 16, 4, 4, n_absent=2), torch.float32, 0)
    missed = torch.zeros(1, dtype=torch.int32)
    begun(call, missed).add(part_of(call, range(4)))
    assert int(missed) == 1


@pytest.mark.parametrize("n_tokens", [1, 2])
def test_later_calls_of_the_same_sizes_are_right_too(n_tokens: int) -> None:
    first = random_call(Sizes(n_tokens, 32, 16, 12, 2), torch.float32, 0, by_address=True)
    missed = torch.zeros(1, dtype=torch.int32)
    kernels = kernels_of(first, missed)
    for seed in range(3):
        other = random_call(Sizes(n_tokens, 32, 16, 12, 2), torch.float32, seed)
        call = replace(first, x=other.x, ids=other.ids, weights=other.weights)
        parts = kernels.begin(call.x, call.ids, call.weights)
        assert isinstance(parts, DecodedParts)
        parts.add(part_of(call, range(call.n_pairs)))
        check_result(call, parts.finish(), missed)
    with pytest.raises(KernelInputError, match="contiguous"):
        kernels.begin(first.x.T.contiguous().T, first.ids, first.weights) if n_tokens > 1 else kernels.begin(
            torch.empty(1, 64)[:, ::2], first.ids, first.weights
        )
