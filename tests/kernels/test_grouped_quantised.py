"""The grouped kernels on quantised experts under Triton's interpreter, against float64 arithmetic on the dequantised weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gated_activation import CLAMPED_SWIGLU, SWIGLU
from kernels.grouped_mlp import grouped_mlp
from kernels.grouped_tiles import quantised_tiles
from kernels.moe_call import MoECall
from kernels.moe_mlp import choose_path, moe_mlp
from kernels.quantised import FP4_VALUES, QuantFormat
from kernels.quantised_experts import QuantisedTable
from prefetch.quantised_geometry import QuantisedGeometry
from tests.kernels.random_moe import FORMATS, TOLERANCES, Sizes, check_result, poisoned, quantised_call

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(call: MoECall) -> None:
    out, missed = poisoned(call)
    assert grouped_mlp(call, out, missed) is out
    check_result(call, out, missed)


@st.composite
def drawn_calls(draw: st.DrawFn) -> MoECall:
    how = draw(st.sampled_from(FORMATS))
    n_experts = draw(st.integers(1, 7))
    step = how.group or 1
    sizes = Sizes(
        n_tokens=draw(st.integers(1, 40)),
        hidden=step * draw(st.integers(1, 3)) if how.group else draw(st.integers(8, 150)),
        intermediate=step * draw(st.integers(1, 2)) if how.group else draw(st.integers(1, 80)),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        n_absent=draw(st.integers(0, n_experts)),
    )
    gpt_oss = draw(st.booleans())
    return quantised_call(
        sizes, how, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**16)), draw(st.booleans()),
        biases=gpt_oss, addends=draw(st.booleans()), activation=CLAMPED_SWIGLU if gpt_oss else SWIGLU,
    )  # fmt: skip


@given(drawn_calls())
@settings(max_examples=15, deadline=None)
def test_any_call(call: MoECall) -> None:
    check(call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_every_format(how: QuantFormat, dtype: torch.dtype) -> None:
    check(quantised_call(Sizes(9, 128, 128, 3, 2, n_absent=1), how, dtype, seed=1))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(Sizes(1, 64, 32, 8, 2), id="one token"),
        pytest.param(Sizes(17, 96, 32, 5, 5), id="k = E, a tile and one row, half a block of depth"),
        pytest.param(Sizes(3, 32, 320, 3, 2), id="several blocks along I"),
        pytest.param(Sizes(300, 32, 64, 2, 1), id="the largest tiles"),
    ],
)
@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_shapes(sizes: Sizes, kind: str) -> None:
    check(quantised_call(sizes, QuantFormat(kind, 32), torch.bfloat16, seed=3))


@pytest.mark.parametrize(("how", "n_codes"), [(QuantFormat("fp8"), 256), (QuantFormat("mxfp4", 32), 16)], ids=str)
def test_every_code_is_the_number_that_torch_reads(how: QuantFormat, n_codes: int) -> None:
    """Row r of down begins with code r, and y is (1, 0, 0, ...): out[r] is that code's number, to the bit in bf16 too."""
    numbers = (
        torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        if how.kind == "fp8"
        else torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)]).repeat(16)
    )
    geometry = QuantisedGeometry(256, 32, torch.bfloat16, how=how)
    pool = torch.zeros(1, geometry.row_bytes, dtype=torch.uint8)
    down = geometry.parts(pool[0])[1]
    down.codes[:, 0] = torch.where(numbers.isfinite(), torch.arange(256) % n_codes, 0)
    down.scales.fill_(127 if how.kind == "mxfp4" else 1)
    bias = torch.zeros(1, 64, dtype=torch.bfloat16)
    bias[:, :32] = 128.0  # gate: silu(128) = 128
    bias[:, 32] = 2**-7  # up, first row alone
    call = MoECall(
        torch.ones(1, 256, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1),
        QuantisedTable(geometry, (pool,), torch.zeros(1, 1, dtype=torch.int32)), 0,
        gate_up_bias=bias, down_bias=torch.zeros(1, 256, dtype=torch.bfloat16),
    )  # fmt: skip
    assert torch.equal(grouped_mlp(call)[0].float(), numbers.nan_to_num(0))


def test_padding_is_no_miss_and_an_unknown_expert_is_one() -> None:
    how = QuantFormat("int4", 32)
    call = quantised_call(Sizes(2, 32, 32, 4, 2), how, torch.float32, seed=4, ids=torch.tensor([[2, -1], [-1, -1]]).int())
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
    small = quantised_call(Sizes(5, 32, 32, 2, 2), QuantFormat("int8", 32), torch.bfloat16, seed=5)
    size, apart = small.table.geometry, 2**33
    memory = torch.empty(apart + size.row_bytes, dtype=torch.uint8)
    pool = memory.as_strided((2, size.row_bytes), (apart, 1))
    for expert in range(2):
        pool[expert] = small.table.pools[0][int(small.table.entries[1, expert])]
    assert isinstance(size, QuantisedGeometry)
    check(replace(small, table=QuantisedTable(size, (pool,), torch.tensor([[-1, -1], [0, 1]]).int())))


def test_two_runs_give_the_same_bits() -> None:
    call = quantised_call(Sizes(33, 64, 64, 5, 3), QuantFormat("int4", 64), torch.bfloat16, seed=7, addends=True)
    assert torch.equal(grouped_mlp(call), grouped_mlp(call))


@pytest.mark.parametrize("path", ["auto", "decode", "grouped"])
@pytest.mark.parametrize("n_tokens", [1, 9])
def test_the_switch_serves_quantised_experts(n_tokens: int, path: str) -> None:
    call = quantised_call(Sizes(n_tokens, 64, 32, 5, 2, n_absent=1), QuantFormat("mxfp4", 32), torch.float16, seed=8)
    assert choose_path(1, 5, 2) == "decode" and choose_path(9, 5, 2) == "grouped"
    out, missed = poisoned(call)
    assert moe_mlp(call, out, missed, path=path) is out
    check_result(call, out, missed)


def test_paths_agree_with_each_other() -> None:
    call = quantised_call(Sizes(6, 64, 64, 5, 2), QuantFormat("int4", 32), torch.float32, seed=2)
    decode, grouped = moe_mlp(call, path="decode"), moe_mlp(call, path="grouped")
    assert (decode - grouped).norm() <= 2 * TOLERANCES[torch.float32] * decode.norm()


def test_blocks_of_depth_are_whole_groups() -> None:
    for how in FORMATS:
        for dtype in DTYPES:
            for n_pairs in (8, 512, 40_000):
                assert quantised_tiles(n_pairs, 128, dtype, how).depth % (how.group or 1) == 0
