"""Sizes that every part agrees on: which experts exist and how large one is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TENSOR_ALIGNMENT = 128  # bytes; where each tensor of an expert's row starts (wide loads need it)
PAGE_BYTES = 4096  # O_DIRECT wants offset, length and buffer aligned to this

LoadWeights = Callable[[Tensor, Tensor], None]  # writes an expert's weights into gate_up [2I, H] and down [H, I]
ReadWeights = Callable[[], tuple[Tensor, Tensor]]  # gives gate_up [2I, H] and down [H, I]


class ExpertKey(NamedTuple):
    """One expert of the model: MoE layer index (0-based over MoE layers) and expert index in that layer."""

    layer: int
    expert: int


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class ExpertGeometry:
    """One expert's packed row: gate_up [2I, H] then down [H, I], each tensor aligned, the row padded to whole pages."""

    hidden: int  # H
    intermediate: int  # I
    dtype: torch.dtype

    @property
    def gate_up_shape(self) -> tuple[int, int]:
        return 2 * self.intermediate, self.hidden

    @property
    def down_shape(self) -> tuple[int, int]:
        return self.hidden, self.intermediate

    @property
    def gate_up_bytes(self) -> int:
        return 2 * self.intermediate * self.hidden * self.dtype.itemsize

    @property
    def down_bytes(self) -> int:
        return self.intermediate * self.hidden * self.dtype.itemsize

    @property
    def down_offset(self) -> int:
        """Byte offset of the down tensor inside the row."""
        return round_up(self.gate_up_bytes, TENSOR_ALIGNMENT)

    @property
    def row_bytes(self) -> int:
        """Bytes of one packed expert row, padded to whole pages: the unit of every transfer."""
        return round_up(self.down_offset + self.down_bytes, PAGE_BYTES)

    @property
    def format_name(self) -> str:
        """What a row's weights are, e.g. "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def layout(self) -> dict[str, tuple[list[int], int]]:
        """Shape and byte offset inside the row of every tensor, by name."""
        return {"gate_up": (list(self.gate_up_shape), 0), "down": (list(self.down_shape), self.down_offset)}

    def reader(self, row: Tensor) -> ReadWeights:
        """What gives the expert in `row`, uint8 [row_bytes], as it is whenever it is called. Here: views of the row."""
        gate_up = row[: self.gate_up_bytes].view(self.dtype).view(self.gate_up_shape)
        down = row[self.down_offset : self.down_offset + self.down_bytes].view(self.dtype).view(self.down_shape)
        return lambda: (gate_up, down)

    def operands(self, row: Tensor) -> ReadWeights:
        """As `reader`, transposed: gate_up.t() [H, 2I] and down.t() [I, H], which inputs are multiplied by."""
        gate_up, down = (weight.t() for weight in self.reader(row)())
        return lambda: (gate_up, down)

    def fill(self, row: Tensor, load: LoadWeights) -> None:
        """Let `load` write an expert's weights in `dtype`, and put them into `row`; its padding is left alone."""
        load(*self.reader(row)())


@dataclass(frozen=True)
class MoEGeometry:
    """The routed part of a model: L MoE layers of E experts, k of them per token."""

    n_layers: int  # L
    n_experts: int  # E
    top_k: int  # k
    expert: ExpertGeometry

    @property
    def n_total(self) -> int:
        """All experts of the model, L * E."""
        return self.n_layers * self.n_experts

    @property
    def total_bytes(self) -> int:
        return self.n_total * self.expert.row_bytes
