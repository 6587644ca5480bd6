"""Quantised experts as rows: how one is laid out, filled and read back.

A row holds four tensors, each aligned: gate_up codes, gate_up scales, down codes, down scales (`kernels.quantised` has the formats).
A `QuantisedGeometry` is an `ExpertGeometry` with fewer bytes, so stores, slots and transfers move these rows as they move any other.
Its `dtype` is that of the activations, and of the weights that quantisation starts from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.quantised import QuantFormat, Quantised, dequantise, quantise
from prefetch.errors import KernelInputError
from prefetch.geometry import TENSOR_ALIGNMENT, ExpertGeometry, LoadWeights, ReadWeights, round_up


@dataclass(frozen=True)
class QuantisedGeometry(ExpertGeometry):
    """One quantised expert's row. Every part starts at a multiple of 128 bytes.

    Raises:
        KernelInputError: H or I do not divide into the format's groups.
    """

    how: QuantFormat = field(kw_only=True)

    def __post_init__(self) -> None:
        self.how.codes_shape(*self.gate_up_shape)
        self.how.codes_shape(*self.down_shape)

    @property
    def gate_up_scales_offset(self) -> int:
        """Byte offset inside the row."""
        return round_up(self.how.n_bytes(*self.gate_up_shape)[0], TENSOR_ALIGNMENT)

    @property
    def gate_up_bytes(self) -> int:
        """Codes, padding and scales."""
        return self.gate_up_scales_offset + self.how.n_bytes(*self.gate_up_shape)[1]

    @property
    def down_scales_offset(self) -> int:
        """Byte offset inside the row."""
        return self.down_offset + round_up(self.how.n_bytes(*self.down_shape)[0], TENSOR_ALIGNMENT)

    @property
    def down_bytes(self) -> int:
        """Codes, padding and scales."""
        return self.down_scales_offset - self.down_offset + self.how.n_bytes(*self.down_shape)[1]

    def parts(self, row: Tensor) -> tuple[Quantised, Quantised]:
        """gate_up and down as views of a row, uint8 [row_bytes]."""
        gate_up = self._matrix(row, 0, self.gate_up_scales_offset, self.gate_up_shape)
        return gate_up, self._matrix(row, self.down_offset, self.down_scales_offset, self.down_shape)

    @property
    def format_name(self) -> str:
        """E.g. "int4 per 32 of float32"."""
        return f"{self.how} of {super().format_name}"

    @property
    def layout(self) -> dict[str, tuple[list[int], int]]:
        """Of codes, bytes [rows, bytes of a row], and of scales [rows, groups]."""
        gate_up, down = self.gate_up_shape, self.down_shape
        return {
            "gate_up": (list(self.how.codes_shape(*gate_up)), 0),
            "gate_up_scales": (list(self.how.scales_shape(*gate_up)), self.gate_up_scales_offset),
            "down": (list(self.how.codes_shape(*down)), self.down_offset),
            "down_scales": (list(self.how.scales_shape(*down)), self.down_scales_offset),
        }

    def reader(self, row: Tensor) -> ReadWeights:
        """What dequantises the expert in `row` whenever it is called, to `dtype`."""
        parts = self.parts(row)
        return lambda: self.dequantised(parts, self.dtype)

    def operands(self, row: Tensor) -> ReadWeights:
        """As `reader`, transposed."""
        read = self.reader(row)

        def transposed() -> tuple[Tensor, Tensor]:
            gate_up, down = read()
            return gate_up.t(), down.t()

        return transposed

    def dequantised(self, parts: tuple[Quantised, Quantised], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """gate_up [2I, H] and down [H, I] of `parts`, rounded to `dtype`."""
        gate_up, down = (dequantise(part, self.how).to(dtype) for part in parts)
        return gate_up, down

    def fill(self, row: Tensor, load: LoadWeights) -> None:
        """Let `load` write an expert's weights in `dtype`, and put their nearest codes into `row`; its padding is left alone."""
        gate_up, down = (torch.empty(shape, dtype=self.dtype) for shape in (self.gate_up_shape, self.down_shape))
        load(gate_up, down)
        self.pack(gate_up, down, row)

    def pack(self, gate_up: Tensor, down: Tensor, row: Tensor) -> None:
        """Quantise one expert into its row.

        Args:
            gate_up: [2I, H] and down: [H, I], any of the float dtypes.
            row: uint8 [row_bytes], such as a slot; its padding is left alone.

        Raises:
            KernelInputError: shapes that are not this geometry's, or weights that the format cannot hold.
        """
        for name, tensor, shape in (
            ("gate_up", gate_up, self.gate_up_shape),
            ("down", down, self.down_shape),
            ("row", row, (self.row_bytes,)),
        ):
            if tensor.shape != shape:
                raise KernelInputError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        quantised = quantise(gate_up, self.how), quantise(down, self.how)
        for target, source in zip(self.parts(row), quantised, strict=True):
            target.codes.copy_(source.codes)
            target.scales.copy_(source.scales)

    def _matrix(self, row: Tensor, codes_at: int, scales_at: int, shape: tuple[int, int]) -> Quantised:
        n_codes, n_scales = self.how.n_bytes(*shape)
        return Quantised(
            row[codes_at : codes_at + n_codes].view(self.how.codes_shape(*shape)),
            row[scales_at : scales_at + n_scales].view(self.how.scale_dtype).view(self.how.scales_shape(*shape)),
        )
