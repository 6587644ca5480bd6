"""Weights in 8 or 4 bits: four formats, and their quantisation and dequantisation in PyTorch.

| format   | code of a weight               | scale                                | bits a weight at H = 2048           |
| int8     | two's complement, -127..127    | fp16 for each group of columns       | 8 + 16 / group                      |
| int4     | two's complement, -7..7        | fp16 for each group of columns       | 4 + 16 / group                      |
| fp8      | e4m3 (1 sign, 4 exponent, 3)   | fp32 for each row                    | 8 + 32 / H                          |
| mxfp4    | e2m1: 0 .5 1 1.5 2 3 4 6       | power of two (e8m0) for each 32      | 4.25                                |

weight = code * scale. Integer scales are rounded up to fp16, so that no weight is clipped: every error is at most half a scale. mxfp4's are
floor(log2(greatest weight)) - 2, as the OCP Microscaling specification (v1.0) has it: weights beyond 6 scales become 6 scales.

A byte of a 4-bit format holds two weights half a group apart: low nibbles are a group's first half, high nibbles its second.
A thread that loads 16 bytes then multiplies with two contiguous pieces of x, and neither needs to be shuffled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from prefetch.errors import KernelInputError

Kind = Literal["int8", "int4", "fp8", "mxfp4"]
GROUPS = {"int8": (128, 64, 32), "int4": (128, 64, 32), "fp8": (None,), "mxfp4": (32,)}
SCALE_DTYPES = {"int8": torch.float16, "int4": torch.float16, "fp8": torch.float32, "mxfp4": torch.uint8}
LARGEST_CODE = {"int8": 127, "int4": 7}
FP8_LARGEST = 448.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 is the sign
E8M0_BIAS = 127

E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # by code
E2M1_VALUES = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])


@dataclass(frozen=True)
class QuantFormat:
    """A format with its group size.

    Raises:
        KernelInputError: there is no such format.
    """

    kind: Kind
    group: int | None = None  # columns that share a scale; None = the whole row

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise KernelInputError(f"format {self.kind!r} is unknown: choose one of {', '.join(get_args(Kind))}")
        if self.group not in GROUPS[self.kind]:
            allowed = ", ".join(map(str, GROUPS[self.kind]))
            raise KernelInputError(f"{self.kind} with group = {self.group}: this format takes {allowed}")

    def __str__(self) -> str:
        return self.kind if self.group is None else f"{self.kind} per {self.group}"

    @property
    def bits(self) -> int:
        return 8 if self.kind in ("int8", "fp8") else 4

    @property
    def scale_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.kind]

    def codes_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Of the uint8 codes of a [rows, columns] matrix.

        Raises:
            KernelInputError: `columns` is no multiple of the group.
        """
        if self.group is not None and columns % self.group:
            raise KernelInputError(f"{columns} columns do not divide into groups of {self.group} ({self})")
        return rows, columns * self.bits // 8

    def scales_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, 1 if self.group is None else columns // self.group

    def n_bytes(self, rows: int, columns: int) -> tuple[int, int]:
        """Of codes and of scales."""
        codes, scales = self.codes_shape(rows, columns), self.scales_shape(rows, columns)
        return codes[0] * codes[1], scales[0] * scales[1] * self.scale_dtype.itemsize


class Quantised(NamedTuple):
    """One matrix."""

    codes: Tensor  # uint8 [rows, bytes]
    scales: Tensor  # [rows, groups] fp16, fp32, or uint8 exponents


def quantise(weight: Tensor, how: QuantFormat) -> Quantised:
    """The nearest codes for a float matrix [rows, columns].

    Raises:
        KernelInputError: a weight is not finite or too large for fp16 scales, or the columns do not divide into groups.
    """
    rows, columns = weight.shape
    how.codes_shape(rows, columns)
    groups = weight.float().view(rows, -1, how.group or columns)
    greatest = groups.abs().amax(-1)
    if not greatest.isfinite().all():
        raise KernelInputError(f"cannot quantise to {how.kind}: a weight is not finite")
    if how.kind == "fp8":
        scales = greatest / FP8_LARGEST
        scales = torch.where(scales > 0, scales, 1.0)
        codes = (groups / scales[..., None]).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        return Quantised(codes.view(rows, columns), scales)
    if how.kind == "mxfp4":
        exponents = _e8m0(greatest)
        values = torch.ldexp(groups, -exponents[..., None])
        return Quantised(_pack_nibbles(_fp4_codes(values)), (exponents + E8M0_BIAS).to(torch.uint8))
    scales = _half_rounded_up(greatest / LARGEST_CODE[how.kind])
    codes = (groups / torch.where(scales > 0, scales.float(), 1.0)[..., None]).round().to(torch.int8)
    return Quantised(codes.view(torch.uint8).view(rows, columns) if how.kind == "int8" else _pack_nibbles(codes & 15), scales)


def dequantise(found: Quantised, how: QuantFormat) -> Tensor:
    """float32 [rows, columns], exactly code * scale."""
    rows, n_groups = found.scales.shape
    if how.kind == "fp8":
        return _look_up(E4M3_VALUES, found.codes) * found.scales
    if how.kind == "int8":
        values = found.codes.view(torch.int8).float()
    elif how.kind == "int4":
        halves = found.codes.view(torch.int8).view(rows, n_groups, -1)
        values = torch.cat([(halves << 4) >> 4, halves >> 4], dim=-1).float()
    else:
        values = _look_up(E2M1_VALUES, _unpack_nibbles(found.codes, n_groups))
    powers = found.scales.int() - E8M0_BIAS
    scales = torch.ldexp(torch.ones_like(powers), powers) if how.kind == "mxfp4" else found.scales.float()
    return (values.view(rows, n_groups, -1) * scales[..., None]).view(rows, -1)


def _half_rounded_up(scales: Tensor) -> Tensor:
    """The least fp16 that is not smaller; `scales` float32 >= 0."""
    halves = scales.half()
    halves = torch.where(halves.float() < scales, (halves.view(torch.int16) + 1).view(torch.float16), halves)
    if not halves.isfinite().all():
        raise KernelInputError(f"weights need a scale of {float(scales.max()):g}, fp16 ends at 65504: use fp8 or mxfp4")
    return halves


def _e8m0(greatest: Tensor) -> Tensor:
    """int32 exponents of the scales: those of the greatest weights less e2m1's own, which is 2; as small as can be for zeros."""
    exponents = torch.frexp(greatest).exponent - 1 - 2
    return torch.where(greatest > 0, exponents, -E8M0_BIAS).clamp(min=-E8M0_BIAS)


def _fp4_codes(values: Tensor) -> Tensor:
    """The nearest of e2m1's values, halfway to the even code."""
    table = torch.tensor(FP4_VALUES, device=values.device)
    size = values.abs().clamp(max=FP4_VALUES[-1])
    upper = torch.searchsorted(table, size.contiguous()).clamp(max=7)  # table[upper] >= size
    lower = (upper - 1).clamp(min=0)
    below, above = size - table[lower], table[upper] - size
    code = torch.where((below < above) | ((below == above) & (lower % 2 == 0)), lower, upper)
    return (code + 8 * values.signbit()).to(torch.uint8)


def _look_up(values: Tensor, codes: Tensor) -> Tensor:
    """float32 `values` of integer `codes`: a fifth of the time of torch's own conversion on a CPU."""
    return values.to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """[rows, groups, group] codes below 16 -> bytes [rows, groups * group / 2]."""
    low, high = codes.view(torch.uint8).chunk(2, dim=-1)
    return (low | (high << 4)).reshape(len(codes), -1)


def _unpack_nibbles(packed: Tensor, n_groups: int) -> Tensor:
    """Its inverse, int8 [rows, groups, group]."""
    halves = packed.view(len(packed), n_groups, -1)
    return torch.cat([halves & 15, halves >> 4], dim=-1).view(torch.int8)
