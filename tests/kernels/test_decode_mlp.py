"""The decode kernels under Triton's interpreter, against float64 arithmetic on the same rounded inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.decode_mlp import decode_launches, decode_mlp, decode_tiles
from kernels.gated_activation import CLAMPED_SWIGLU, SWIGLU
from kernels.slot_table import ExpertTable
from prefetch.errors import KernelInputError
from tests.kernels.random_moe import Sizes, check_result, poisoned, random_call

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@st.composite
def drawn_sizes(draw: st.DrawFn) -> Sizes:
    n_experts = draw(st.integers(1, 11))
    return Sizes(
        n_tokens=draw(st.integers(1, 4)),
        hidden=draw(st.integers(8, 90)),  # of fewer sums all may cancel, and rounding is judged against what is left
        intermediate=draw(st.integers(1, 50)),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        n_absent=draw(st.integers(0, n_experts)),
    )


@given(drawn_sizes(), st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_any_call(sizes: Sizes, dtype: torch.dtype, by_address: bool, gpt_oss: bool, addends: bool, seed: int) -> None:
    call = random_call(
        sizes, dtype, seed,
        by_address=by_address, biases=gpt_oss, addends=addends, activation=CLAMPED_SWIGLU if gpt_oss else SWIGLU,
    )  # fmt: skip
    out, missed = poisoned(call)
    decode_mlp(call, out, missed)
    check_result(call, out, missed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(Sizes(1, 64, 32, 8, 2), id="one token"),
        pytest.param(Sizes(1, 1, 1, 1, 1), id="one of everything"),
        pytest.param(Sizes(2, 32, 16, 5, 5), id="k = E"),
        pytest.param(Sizes(2, 600, 40, 3, 2), id="three blocks along H"),
        pytest.param(Sizes(2, 40, 530, 3, 2), id="three blocks along I"),
        pytest.param(Sizes(1, 48, 20, 13, 10), id="more ranks than a power of two"),
    ],
)
def test_shapes(sizes: Sizes, dtype: torch.dtype) -> None:
    call = random_call(sizes, dtype, seed=3)
    out, missed = poisoned(call)
    decode_mlp(call, out, missed)
    check_result(call, out, missed)


def test_all_tokens_on_one_expert_and_int64_ids() -> None:
    call = random_call(Sizes(4, 33, 17, 7, 1), torch.float32, seed=5, ids=torch.full((4, 1), 6))
    out, missed = poisoned(call)
    decode_mlp(call, out, missed)
    check_result(call, out, missed)


def test_padding_is_no_miss_and_an_unknown_expert_is_one() -> None:
    call = random_call(Sizes(2, 32, 16, 4, 2), torch.float32, seed=6, ids=torch.tensor([[2, -1], [-1, -1]]).int())
    out, missed = poisoned(call)
    decode_mlp(call, out, missed)
    check_result(call, out, missed)
    assert not missed and (out[1] == 0).all()
    call = replace(call, ids=torch.tensor([[2, 4], [1, 2**31 - 1]]).int())
    decode_mlp(call, out, missed)
    check_result(call, out, missed)
    assert missed


def test_an_entry_gone_bad_after_the_check_reads_nothing() -> None:
    """The table may change on the device: a slot past the pool's end is a miss there."""
    call = random_call(Sizes(1, 32, 16, 4, 4), torch.float32, seed=7)
    good = call.table.entries.clone()
    call.table.entries[1, 2] = call.table.pools[0].shape[0]
    out, missed = poisoned(call)
    decode_mlp(call, out, missed)
    call.table.entries[1, 2] = -1
    check_result(call, out, missed)
    call.table.entries.copy_(good)
    decode_mlp(call, out, missed.zero_())
    check_result(call, out, missed)


def test_result_has_the_same_bits_whatever_the_slots() -> None:
    outs = []
    for seed in (0, 1):
        call = random_call(Sizes(3, 40, 24, 6, 3), torch.bfloat16, seed=8)
        entries, pool = call.table.entries, call.table.pools[0]
        shuffle = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        pool.copy_(pool[shuffle])
        entries.copy_(shuffle.argsort()[entries.long()])
        outs.append(decode_mlp(call, *poisoned(call)))
    assert torch.equal(*outs)


def test_a_pool_larger_than_32_bits_can_address() -> None:
    """Two rows 2^33 bytes apart: in 32 bits, the second one's offset would be 0. Only the rows' own pages are ever touched."""
    small = random_call(Sizes(2, 32, 16, 2, 2), torch.bfloat16, seed=9)
    apart = 2**33
    memory = torch.empty(apart + small.table.geometry.row_bytes, dtype=torch.uint8)
    pool = memory.as_strided((2, small.table.geometry.row_bytes), (apart, 1))
    for expert in range(2):
        pool[expert] = small.table.pools[0][int(small.table.entries[1, expert])]
    table = ExpertTable(small.table.geometry, (pool,), torch.tensor([[-1, -1], [0, 1]]).int())
    call = replace(small, table=table)
    out, missed = poisoned(call)
    decode_mlp(call, out, missed)
    check_result(call, out, missed)


def test_nan_reaches_the_output_through_the_clamp() -> None:
    call = random_call(Sizes(2, 32, 16, 3, 2), torch.float32, seed=10, biases=True, activation=CLAMPED_SWIGLU)
    call.x[1, 5] = float("nan")
    out = decode_mlp(call)
    assert torch.isfinite(out[0]).all() and torch.isnan(out[1]).all()


def test_the_residual_may_be_the_output() -> None:
    call = random_call(Sizes(2, 40, 16, 3, 2), torch.float32, seed=11, addends=True)
    expected = decode_mlp(call)
    assert call.residual is not None
    assert torch.equal(decode_mlp(call, out=call.residual), expected)


def test_too_many_pairs_are_refused() -> None:
    call = random_call(Sizes(22_000, 1, 1, 3, 3), torch.float32, seed=0)
    with pytest.raises(KernelInputError, match="66000 .* at most 65535; use grouped_mlp"):
        decode_launches(call, *poisoned(call))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2048, 768, 8), (4096, 14336, 2), (2880, 2880, 4), (2048, 1408, 6)])
def test_tiles_fill_registers_and_no_more(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """8 loads of 16 bytes a thread and pass."""
    tiles = decode_tiles(*sizes, dtype.itemsize)
    threads, ranks = 32 * tiles.num_warps, 1 << (sizes[2] - 1).bit_length()
    assert 2 * tiles.gate_up_rows * tiles.gate_up_columns * dtype.itemsize == 128 * threads
    assert 128 * threads == tiles.down_rows * tiles.down_columns * ranks * dtype.itemsize
