"""The quantised decode kernels under Triton's interpreter, against float64 arithmetic on the dequantised weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.decode_mlp import decode_mlp
from kernels.decode_quantised import decode_quantised
from kernels.gated_activation import CLAMPED_SWIGLU, SWIGLU
from kernels.moe_call import MoECall
from kernels.quantised import FP4_VALUES, QuantFormat, Quantised, dequantise
from kernels.quantised_experts import QuantisedTable
from prefetch.errors import KernelInputError
from prefetch.geometry import ExpertGeometry
from prefetch.quantised_geometry import QuantisedGeometry
from tests.kernels.random_moe import FORMATS, Sizes, check_result, poisoned, quantised_call, random_call

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(call: MoECall) -> None:
    out, missed = poisoned(call)
    decode_quantised(call, out, missed)
    check_result(call, out, missed)


@st.composite
def drawn_calls(draw: st.DrawFn) -> MoECall:
    how = draw(st.sampled_from(FORMATS))
    n_experts = draw(st.integers(1, 7))
    step = how.group or 1
    sizes = Sizes(
        n_tokens=draw(st.integers(1, 2)),
        hidden=step * draw(st.integers(1, 2 if how.group else 70)),
        intermediate=step * draw(st.integers(1, 1 if how.group else 50)),
        n_experts=n_experts,
        top_k=draw(st.integers(1, min(n_experts, 2))),
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


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_every_format(how: QuantFormat) -> None:
    check(quantised_call(Sizes(1, 128, 128, 3, 2), how, torch.float32, seed=1))


@pytest.mark.parametrize(
    ("how", "hidden", "intermediate"),
    [
        (QuantFormat("int8", 32), 1056, 32),
        (QuantFormat("int8", 32), 32, 1056),
        (QuantFormat("int4", 64), 2112, 64),
        (QuantFormat("fp8"), 1041, 16),
    ],
    ids=str,
)
def test_rows_longer_than_a_tile(how: QuantFormat, hidden: int, intermediate: int) -> None:
    check(quantised_call(Sizes(1, hidden, intermediate, 2, 1), how, torch.bfloat16, seed=2))


@pytest.mark.parametrize(("how", "n_codes"), [(QuantFormat("fp8"), 256), (QuantFormat("mxfp4", 32), 16)], ids=str)
def test_every_code_is_the_number_that_torch_reads(how: QuantFormat, n_codes: int) -> None:
    """Row r of down begins with code r, and y is (1, 0, 0, ...): out[r] is that code's number."""
    expected = (
        torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        if how.kind == "fp8"
        else torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)]).repeat(16)
    )
    codes = torch.arange(256) % n_codes
    geometry = QuantisedGeometry(256, 32, torch.float32, how=how)
    pool = torch.zeros(1, geometry.row_bytes, dtype=torch.uint8)
    down = geometry.parts(pool[0])[1]
    down.codes[:, 0] = torch.where(expected.isfinite(), codes, 0)
    down.scales.fill_(127 if how.kind == "mxfp4" else 1)
    bias = torch.zeros(1, 64)
    bias[:, :32] = 100.0  # gate: silu(100) = 100
    bias[:, 32] = 0.01  # up, first row alone
    call = MoECall(
        torch.ones(1, 256), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1),
        QuantisedTable(geometry, (pool,), torch.zeros(1, 1, dtype=torch.int32)), 0,
        gate_up_bias=bias, down_bias=torch.zeros(1, 256),
    )  # fmt: skip
    torch.testing.assert_close(decode_quantised(call)[0], expected.nan_to_num(0), rtol=1e-6, atol=0)


def test_padding_is_no_miss_and_an_unknown_expert_is_one() -> None:
    how = QuantFormat("int4", 32)
    call = quantised_call(Sizes(2, 32, 32, 4, 2), how, torch.float32, seed=4, ids=torch.tensor([[2, -1], [-1, -1]]).int())
    out, missed = poisoned(call)
    decode_quantised(call, out, missed)
    check_result(call, out, missed)
    assert not missed and (out[1] == 0).all()
    call = replace(call, ids=torch.tensor([[2, 4], [1, 2**31 - 1]]).int())
    decode_quantised(call, out, missed)
    check_result(call, out, missed)
    assert missed


def test_a_row_holds_what_quantisation_gives_and_few_bytes() -> None:
    geometry = QuantisedGeometry(2048, 768, torch.bfloat16, how=QuantFormat("int4", 128))
    plain = ExpertGeometry(2048, 768, torch.bfloat16)
    assert geometry.row_bytes == 2_433_024 < 0.26 * plain.row_bytes  # 4 + 16 / 128 bits of 16, in whole pages
    offsets = (geometry.gate_up_scales_offset, geometry.down_offset, geometry.down_scales_offset)
    assert all(offset % 128 == 0 for offset in offsets)
    row = torch.zeros(geometry.row_bytes, dtype=torch.uint8)
    gate_up, down = torch.full((1536, 2048), 7.0), torch.full((2048, 768), -3.5)
    geometry.pack(gate_up, down, row)
    for found, expected in zip(geometry.parts(row), (gate_up, down), strict=True):
        assert torch.equal(dequantise(Quantised(*found), geometry.how), expected)


def test_a_pool_larger_than_32_bits_can_address() -> None:
    """Two rows 2^33 bytes apart: in 32 bits, the second one's offset would be 0. Only the rows' own pages are ever touched."""
    small = quantised_call(Sizes(1, 32, 32, 2, 2), QuantFormat("mxfp4", 32), torch.bfloat16, seed=5)
    size, apart = small.table.geometry, 2**33
    memory = torch.empty(apart + size.row_bytes, dtype=torch.uint8)
    pool = memory.as_strided((2, size.row_bytes), (apart, 1))
    for expert in range(2):
        pool[expert] = small.table.pools[0][int(small.table.entries[1, expert])]
    assert isinstance(size, QuantisedGeometry)
    check(replace(small, table=QuantisedTable(size, (pool,), torch.tensor([[-1, -1], [0, 1]]).int())))


def test_the_plain_decode_kernel_refuses_quantised_experts_and_the_other_way_round() -> None:
    quantised = quantised_call(Sizes(1, 32, 32, 2, 2), QuantFormat("int4", 32), torch.float32, seed=6)
    with pytest.raises(KernelInputError, match=r"quantised \(int4 per 32\): call decode_quantised, grouped_mlp or moe_mlp"):
        decode_mlp(quantised)
    plain = random_call(Sizes(1, 32, 32, 2, 2), torch.float32, seed=6)
    with pytest.raises(KernelInputError, match="needs experts in a QuantisedTable"):
        decode_quantised(plain)
    with pytest.raises(KernelInputError, match="needs a QuantisedGeometry"):
        QuantisedTable(plain.table.geometry, plain.table.pools, plain.table.entries)  # type: ignore[arg-type]


def test_sizes_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(KernelInputError, match="2880 columns do not divide into groups of 128"):
        QuantisedGeometry(2880, 2880, torch.bfloat16, how=QuantFormat("int4", 128))
    with pytest.raises(KernelInputError, match=r"gate_up has shape \[64, 33\], expected \[64, 32\]"):
        geometry = QuantisedGeometry(32, 32, torch.bfloat16, how=QuantFormat("int4", 32))
        geometry.pack(torch.ones(64, 33), torch.ones(32, 32), torch.zeros(geometry.row_bytes, dtype=torch.uint8))
