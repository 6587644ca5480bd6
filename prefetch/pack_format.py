"""The packed expert file: what is where. It is itself a valid safetensors file, so that other tools can open it.

    8-byte length, JSON header padded to whole pages | rows, uint8 [L, E, row_bytes] | checksums, uint32 [L, E]

A row is what one transfer moves: gate_up [2I, H], down [H, I] and zero padding, as `ExpertGeometry` lays them out. Rows
start and end on pages, so that O_DIRECT can read each with one call. A checksum is the CRC-32 of the whole row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from prefetch.geometry import PAGE_BYTES, ExpertGeometry, ExpertKey, MoEGeometry, round_up

VERSION = "1"  # raise it when the layout changes: packs of other versions are packed again
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class PackFormat:
    """The layout of one pack.

    The header is a function of these fields alone: a file that begins otherwise is the pack of another checkpoint,
    dtype or version.
    """

    geometry: MoEGeometry
    fingerprint: str  # of the checkpoint
    modified_ns: int  # of the checkpoint

    @cached_property
    def header(self) -> bytes:
        """The file's first bytes, whole pages."""
        content = json.dumps({"__metadata__": self._metadata()} | self._tensors()).encode()
        padded = round_up(8 + len(content), PAGE_BYTES) - 8
        return padded.to_bytes(8, "little") + content.ljust(padded)

    @property
    def rows_offset(self) -> int:
        return len(self.header)

    @property
    def checksums_offset(self) -> int:
        return self.rows_offset + self.geometry.total_bytes

    @property
    def file_bytes(self) -> int:
        return self.checksums_offset + CHECKSUM_BYTES * self.geometry.n_total

    def offset(self, key: ExpertKey) -> int:
        """Byte offset in the file of the row of `key`, a multiple of 4096. Rows are ordered by layer, then expert."""
        return self.rows_offset + (key.layer * self.geometry.n_experts + key.expert) * self.geometry.expert.row_bytes

    def _metadata(self) -> dict[str, str]:
        expert = self.geometry.expert
        return {
            "format": "gatecast packed experts",
            "version": VERSION,
            "dtype": dtype_name(expert),
            "gate_up": f"{list(expert.gate_up_shape)} at byte 0 of a row",
            "down": f"{list(expert.down_shape)} at byte {expert.down_offset} of a row",
            "checksum": "crc32 of a row",
            "checkpoint_fingerprint": self.fingerprint,
            "checkpoint_modified_ns": str(self.modified_ns),
        }

    def _tensors(self) -> dict[str, dict]:
        table = [self.geometry.n_layers, self.geometry.n_experts]
        rows_end = self.geometry.total_bytes
        checksums_end = rows_end + CHECKSUM_BYTES * self.geometry.n_total
        return {
            "rows": {"dtype": "U8", "shape": [*table, self.geometry.expert.row_bytes], "data_offsets": [0, rows_end]},
            "checksums": {"dtype": "U32", "shape": table, "data_offsets": [rows_end, checksums_end]},
        }


def dtype_name(expert: ExpertGeometry) -> str:
    return str(expert.dtype).removeprefix("torch.")


def row_tensors(row: Tensor, expert: ExpertGeometry) -> tuple[Tensor, Tensor]:
    """gate_up [2I, H] and down [H, I] of a row, uint8 [row_bytes], as views."""
    gate_up = row[: expert.gate_up_bytes].view(expert.dtype).view(expert.gate_up_shape)
    down_end = expert.down_offset + expert.down_bytes
    return gate_up, row[expert.down_offset : down_end].view(expert.dtype).view(expert.down_shape)
