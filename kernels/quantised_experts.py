"""The table that kernels find quantised experts through. Its rows are a `QuantisedGeometry`'s.

`grouped_mlp` reads plain and quantised tables; `decode_mlp` refuses a `QuantisedTable`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.slot_table import ExpertTable
from prefetch.errors import KernelInputError
from prefetch.geometry import ExpertGeometry
from prefetch.quantised_geometry import QuantisedGeometry


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
        return self.geometry.dequantised(self.geometry.parts(row), torch.float32)


def expert_table(geometry: ExpertGeometry, pools: tuple[Tensor, ...], entries: Tensor) -> ExpertTable:
    """The table of the kind that `geometry` asks for; arguments and errors are `ExpertTable`'s."""
    if isinstance(geometry, QuantisedGeometry):
        return QuantisedTable(geometry, pools, entries)
    return ExpertTable(geometry, pools, entries)
