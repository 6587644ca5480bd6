"""The packed expert file: what is where. It is itself a valid safetensors file, so that other tools can open it.

    8-byte length, JSON header padded to whole pages | rows, uint8 [L, E, row_bytes] | checksums, uint32 [L, E]

A row is what one transfer moves: gate_up [2I, H], down [H, I] and zero padding, as `ExpertGeometry` lays them out, or their codes
and scales, as `QuantisedGeometry` does. Rows
start and end on pages, so that O_DIRECT can read each with one call. A checksum is the CRC-32 of the whole row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

from prefetch.geometry import PAGE_BYTES, ExpertKey, MoEGeometry, round_up

VERSION = "1"  # raise it when the layout changes: packs of other versions are packed again
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class PackFormat:
    """The layout of one pack.

    The header is a function of these fields alone: a file that begins otherwise is the pack of another checkpoint,
    format or version.
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

    @staticmethod
    def name_in(header: bytes) -> str:
        """The format's name in the first bytes of some file; "no pack" if they are not a pack's."""
        try:
            size = int.from_bytes(header[:8], "little")
            return str(json.loads(header[8 : 8 + size])["__metadata__"]["dtype"])
        except (ValueError, KeyError, TypeError):
            return "no pack"

    def _metadata(self) -> dict[str, str]:
        expert = self.geometry.expert
        return {
            "format": "gatecast packed experts",
            "version": VERSION,
            "dtype": expert.format_name,
            **{part: f"{shape} at byte {offset} of a row" for part, (shape, offset) in expert.layout.items()},
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
