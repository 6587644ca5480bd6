"""The grouped kernels under Triton's interpreter: grouping against its reference, the MLP against float64 arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gated_activation import CLAMPED_SWIGLU, SWIGLU
from kernels.grouped_mlp import grouped_mlp
from kernels.grouped_tiles import grouped_tiles
from kernels.pair_groups import PairGroups, group_launch, group_pairs_reference
from kernels.slot_table import ExpertTable
from tests.kernels.random_moe import Sizes, check_result, poisoned, random_call

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@st.composite
def drawn_sizes(draw: st.DrawFn) -> Sizes:
    n_experts = draw(st.integers(1, 7))
    return Sizes(
        n_tokens=draw(st.integers(1, 40)),
        hidden=draw(st.integers(8, 90)),  # of fewer sums all may cancel, and rounding is judged against what is left
        intermediate=draw(st.integers(1, 50)),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        n_absent=draw(st.integers(0, n_experts)),
    )


@given(drawn_sizes(), st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_any_call(sizes: Sizes, dtype: torch.dtype, by_address: bool, gpt_oss: bool, addends: bool, seed: int) -> None:
    call = random_call(
        sizes, dtype, seed,
        by_address=by_address, biases=gpt_oss, addends=addends, activation=CLAMPED_SWIGLU if gpt_oss else SWIGLU,
    )  # fmt: skip
    out, missed = poisoned(call)
    grouped_mlp(call, out, missed)
    check_result(call, out, missed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(Sizes(1, 64, 32, 8, 2), id="one token"),
        pytest.param(Sizes(1, 1, 1, 1, 1), id="one of everything"),
        pytest.param(Sizes(17, 40, 24, 5, 5), id="k = E, a tile and one row"),
        pytest.param(Sizes(3, 300, 40, 3, 2), id="several blocks along H"),
        pytest.param(Sizes(3, 40, 300, 3, 2), id="several blocks along I"),
        pytest.param(Sizes(300, 24, 20, 2, 1), id="the largest tiles"),
    ],
)
def test_shapes(sizes: Sizes, dtype: torch.dtype) -> None:
    call = random_call(sizes, dtype, seed=3)
    out, missed = poisoned(call)
    grouped_mlp(call, out, missed)
    check_result(call, out, missed)


def test_all_tokens_on_one_expert_over_many_tiles() -> None:
    call = random_call(Sizes(150, 33, 17, 11, 1), torch.float32, seed=5, ids=torch.full((150, 1), 6))
    out, missed = poisoned(call)
    grouped_mlp(call, out, missed)
    check_result(call, out, missed)


def test_padding_is_no_miss_and_an_unknown_expert_is_one() -> None:
    call = random_call(Sizes(2, 32, 16, 4, 2), torch.float32, seed=6, ids=torch.tensor([[2, -1], [-1, -1]]).int())
    out, missed = poisoned(call)
    grouped_mlp(call, out, missed)
    check_result(call, out, missed)
    assert not missed and (out[1] == 0).all()
    call = replace(call, ids=torch.tensor([[2, 4], [1, 2**31 - 1]]).int())
    grouped_mlp(call, out, missed)
    check_result(call, out, missed)
    assert missed


def test_a_pool_larger_than_32_bits_can_address() -> None:
    """Two rows 2^33 bytes apart: in 32 bits, the second one's offset would be 0. Only the rows' own pages are ever touched."""
    small = random_call(Sizes(5, 32, 16, 2, 2), torch.float16, seed=9)
    apart = 2**33
    memory = torch.empty(apart + small.table.geometry.row_bytes, dtype=torch.uint8)
    pool = memory.as_strided((2, small.table.geometry.row_bytes), (apart, 1))
    for expert in range(2):
        pool[expert] = small.table.pools[0][int(small.table.entries[1, expert])]
    call = replace(small, table=ExpertTable(small.table.geometry, (pool,), torch.tensor([[-1, -1], [0, 1]]).int()))
    out, missed = poisoned(call)
    grouped_mlp(call, out, missed)
    check_result(call, out, missed)


@given(st.integers(1, 9), st.integers(1, 700), st.sampled_from([16, 32, 64]), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_groups(n_experts: int, n_pairs: int, tile_rows: int, seed: int) -> None:
    """Ids from -2 to two past the last expert: those without an expert are in no group."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, n_experts + 2, (n_pairs, 1), generator=generator).int()
    groups = PairGroups.empty(ids, n_experts, tile_rows)
    for written in (groups.order, groups.tiles, groups.n_tiles):
        written.fill_(-9)
    group_launch(ids, n_experts, groups).run()
    order, tiles = group_pairs_reference(ids, n_experts, tile_rows)
    assert groups.order[: len(order)].tolist() == order
    assert groups.n_tiles.tolist() == [len(tiles)]
    assert [tuple(row) for row in groups.tiles[: len(tiles)].tolist()] == tiles
    assert (groups.order[len(order) :] == -9).all() and (groups.tiles[len(tiles) :] == -9).all()


def test_ids_that_32_bits_would_take_for_experts_are_missed() -> None:
    ids = torch.tensor([[2, 2**32 + 1], [1 - 2**32, 0], [3, 2**40]])
    call = random_call(Sizes(3, 32, 16, 4, 2), torch.float32, seed=6, ids=ids)
    out, missed = poisoned(call)
    grouped_mlp(call, out, missed)
    check_result(call, out, missed)
    groups = PairGroups.empty(ids, 4, 16)
    group_launch(ids, 4, groups).run()
    order, tiles = group_pairs_reference(ids, 4, 16)
    assert groups.order[: len(order)].tolist() == order and groups.n_tiles.tolist() == [len(tiles)]


@pytest.mark.parametrize("counts", [[1] * 8, [100], [17, 1, 33, 16], [16] * 5 + [1] * 9])
def test_room_for_tiles_in_the_worst_case(counts: list[int]) -> None:
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[:, None]
    groups = PairGroups.empty(ids, len(counts), 16)
    assert len(group_pairs_reference(ids, len(counts), 16)[1]) <= groups.max_tiles


def test_tile_rows_follow_the_load() -> None:
    """Qwen3-30B: 128 experts, top-8."""
    rows = [grouped_tiles(n_tokens * 8, 128, torch.bfloat16).rows for n_tokens in (1, 64, 512, 4096)]
    assert rows == [16, 16, 64, 128]
