"""Quantised experts in slots: how a row is laid out, how it is filled, and the table that kernels find it through.

A row holds four tensors, each aligned: gate_up codes, gate_up scales, down codes, down scales (`kernels.quantised` has the formats).
`QuantisedGeometry` is an `ExpertGeometry` with fewer bytes, so stores, slots and transfers move these rows as they move any other.
Its `dtype` is that of the activations. `grouped_mlp` reads both kinds; `decode_mlp` refuses a `QuantisedTable`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.launch import FLOAT_DTYPES, check_tensor
from kernels.quantised import QuantFormat, Quantised, dequantise, quantise
from kernels.slot_table import ExpertTable
from prefetch.errors import KernelInputError
from prefetch.geometry import TENSOR_ALIGNMENT, ExpertGeometry, round_up


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

    def pack(self, gate_up: Tensor, down: Tensor, row: Tensor) -> None:
        """Quantise one expert into its row.

        Args:
            gate_up: [2I, H] and down: [H, I], any of the float dtypes.
            row: uint8 [row_bytes], such as a slot; its padding is left alone.

        Raises:
            KernelInputError: shapes that are not this geometry's, or weights that the format cannot hold.
        """
        check_tensor("gate_up", gate_up, list(self.gate_up_shape), FLOAT_DTYPES, row.device, contiguous_dims=0)
        check_tensor("down", down, list(self.down_shape), FLOAT_DTYPES, row.device, contiguous_dims=0)
        check_tensor("row", row, [self.row_bytes], [torch.uint8], row.device)
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


@dataclass(frozen=True)
class QuantisedTable(ExpertTable):
    """An `ExpertTable` whose rows are a `QuantisedGeometry`'s."""

    geometry: QuantisedGeometry

    def __post_init__(self) -> None:
        if not isinstance(self.geometry, QuantisedGeometry):
            raise KernelInputError("a QuantisedTable needs a QuantisedGeometry; use ExpertTable for plain experts")
        super().__post_init__()

    def arguments(self, layer: int) -> dict[str, Tensor | int | float | bool | None]:
        """What a launcher asks for that knows plain rows alone: its kernel would misread these.

        Raises:
            KernelInputError: always.
        """
        raise KernelInputError(
            f"these experts are quantised ({self.geometry.how}): call decode_quantised, grouped_mlp or moe_mlp"
        )

    def quantised_arguments(self, layer: int) -> dict[str, Tensor | int | float | bool | None]:
        """What a kernel takes that calls `expert_rows` and knows these rows, for one layer."""
        return super().arguments(layer)

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor] | None:
        """gate_up [2I, H] and down [H, I], dequantised to float32, or None where absent. For references."""
        entry = int(self.entries[layer, expert])
        if entry == (0 if self.by_address else -1):
            return None
        row = self._row_at(entry) if self.by_address else self.pools[0][entry]
        gate_up, down = self.geometry.parts(row)
        return dequantise(gate_up, self.geometry.how), dequantise(down, self.geometry.how)


def table_of(geometry: ExpertGeometry, pools: tuple[Tensor, ...], entries: Tensor) -> ExpertTable:
    """The kind of table that `geometry` has."""
    if isinstance(geometry, QuantisedGeometry):
        return QuantisedTable(geometry, pools, entries)
    return ExpertTable(geometry, pools, entries)
