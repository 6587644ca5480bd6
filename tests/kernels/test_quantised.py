"""Quantised formats: error bounds, representable values, byte counts, and the meaning of every code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.quantised import FP4_VALUES, QuantFormat, Quantised, dequantise, quantise
from prefetch.errors import KernelInputError

FORMATS = [QuantFormat(kind, group) for kind in ("int8", "int4") for group in (128, 64, 32)]
FORMATS += [QuantFormat("fp8"), QuantFormat("mxfp4", 32)]


def random_weights(rows: int, n_groups: int, how: QuantFormat, seed: int, size: float = 0.02) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return size * torch.randn(rows, n_groups * (how.group or 32), generator=random)


@pytest.mark.parametrize("how", FORMATS, ids=str)
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([1e-6, 0.02, 3.0, 1e4]), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_no_error_exceeds_its_bound(how: QuantFormat, rows: int, n_groups: int, size: float, seed: int) -> None:
    weights = random_weights(rows, n_groups, how, seed, size)
    groups = weights.double().view(rows, -1, how.group or weights.shape[1])
    errors = (dequantise(quantise(weights, how), how).double().view_as(groups) - groups).abs()
    greatest = groups.abs().amax(-1, keepdim=True)
    if how.kind in ("int8", "int4"):  # half a scale; scales are fp16, rounded up: 2^-10 relative, 2^-24 at least
        largest = 127 if how.kind == "int8" else 7
        bound = 0.5001 * (greatest / largest * (1 + 2**-10) + 2**-24)
    elif how.kind == "fp8":  # 3 bits of fraction, and half the least step below 2^-6
        bound = 1.0001 * torch.maximum(groups.abs() * 2**-4, greatest / 448 * 2**-10)
    else:  # 1 bit of fraction; half a step of 0.5 below 1; and what lies between 6 and 8 scales is 6
        scale = torch.exp2(torch.floor(torch.log2(greatest)) - 2)
        bound = torch.maximum(torch.maximum(groups.abs() / 4, scale / 4), groups.abs() - 6 * scale)
    assert (errors <= bound).all()


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_representable_weights_come_back_exactly(how: QuantFormat) -> None:
    random = torch.Generator().manual_seed(1)
    group = how.group or 64
    if how.kind in ("int8", "int4"):
        largest = 127 if how.kind == "int8" else 7
        codes = torch.randint(-largest, largest + 1, (6, 3, group), generator=random).float()
        codes[..., 5] = -largest
    elif how.kind == "fp8":
        codes = torch.randint(0, 0x7F, (6, 3, group), generator=random).to(torch.uint8).view(torch.float8_e4m3fn).float()
        codes[:, 0, 0] = 448
    else:
        codes = torch.tensor(FP4_VALUES)[torch.randint(0, 8, (6, 3, group), generator=random)]
        codes[..., 3] = -6
    scales = 2.0 ** torch.randint(-9, 3, (6, 3 if how.group else 1, 1), generator=random)
    weights = (codes * scales).view(6, -1)
    assert torch.equal(dequantise(quantise(weights, how), how), weights)


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_quantising_again_changes_nothing(how: QuantFormat) -> None:
    once = quantise(random_weights(4, 2, how, seed=2), how)
    again = quantise(dequantise(once, how), how)
    torch.testing.assert_close(dequantise(again, how), dequantise(once, how), rtol=2**-9, atol=0)


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_zeros_stay_zeros(how: QuantFormat) -> None:
    assert not dequantise(quantise(torch.zeros(2, 128), how), how).any()


@pytest.mark.parametrize(
    ("how", "n_bytes"),
    [
        (QuantFormat("int8", 128), 768 * 2048 + 768 * 16 * 2),
        (QuantFormat("int4", 64), 768 * 1024 + 768 * 32 * 2),
        (QuantFormat("fp8"), 768 * 2048 + 768 * 4),
        (QuantFormat("mxfp4", 32), 768 * 1024 + 768 * 64),
    ],
    ids=str,
)
def test_byte_counts(how: QuantFormat, n_bytes: int) -> None:
    found = quantise(torch.ones(768, 2048), how)
    assert sum(tensor.numel() * tensor.element_size() for tensor in found) == n_bytes == sum(how.n_bytes(768, 2048))
    assert found.codes.shape == how.codes_shape(768, 2048) and found.scales.shape == how.scales_shape(768, 2048)


def test_every_e2m1_code_means_what_the_specification_says() -> None:
    """Sign, two bits of exponent with bias 1, one bit of fraction; exponent 0 is subnormal."""
    how = QuantFormat("mxfp4", 32)
    codes = torch.arange(16, dtype=torch.uint8)
    values = dequantise(Quantised(codes.repeat(2)[:16][None], torch.tensor([[127 + 3]], dtype=torch.uint8)), how)[0]
    for code in range(16):
        sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
        size = (1 + fraction / 2) * 2 ** (exponent - 1) if exponent else fraction / 2
        assert values[code] == 8 * (-size if sign else size)
    assert not values[16:].any()  # the high nibbles, which are the second half


def test_halfway_values_go_to_the_even_code() -> None:
    how = QuantFormat("mxfp4", 32)
    weights = torch.zeros(1, 32)
    weights[0, :8] = torch.tensor([4, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    assert dequantise(quantise(weights, how), how)[0, :8].tolist() == [4, 0, 1, 1, 2, 2, 4, 4]


def test_low_nibbles_are_the_first_half_of_a_group() -> None:
    how = QuantFormat("int4", 32)
    weights = torch.cat([torch.full((1, 16), 7.0), torch.full((1, 16), -7.0)], dim=1)
    assert (quantise(weights, how).codes == 0x97).all()  # -7 is 0b1001


def test_the_least_e8m0_scale_is_a_number() -> None:
    how = QuantFormat("mxfp4", 32)
    found = quantise(torch.full((1, 32), 2.0**-127), how)
    assert found.scales.item() == 0 and (dequantise(found, how) == 2.0**-127).all()


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(KernelInputError, match="48 columns do not divide into groups of 32"):
        quantise(torch.ones(1, 48), QuantFormat("mxfp4", 32))
    with pytest.raises(KernelInputError, match="not finite"):
        quantise(torch.tensor([[1.0, torch.inf]]), QuantFormat("fp8"))
    with pytest.raises(KernelInputError, match="fp16 ends at 65504"):
        quantise(torch.full((1, 32), 1e6), QuantFormat("int4", 32))
    with pytest.raises(KernelInputError, match="int4 with group = 16: this format takes 128, 64, 32"):
        QuantFormat("int4", 16)
    with pytest.raises(KernelInputError, match="format 'int3' is unknown"):
        QuantFormat("int3", 32)  # type: ignore[arg-type]
