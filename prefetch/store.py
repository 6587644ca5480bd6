"""Where each expert's bytes are: a checkpoint's packed experts, found or made, and read row by row."""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from mmap import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.quantised import QuantFormat
from prefetch.checkpoint import Checkpoint
from prefetch.errors import PackError
from prefetch.geometry import ExpertKey
from prefetch.memory import allocate_pages
from prefetch.pack import is_pack_of, pack_experts, pack_format_of
from prefetch.pack_format import PackFormat
from prefetch.progress import expert_progress

log = logging.getLogger(__name__)


class ExpertStore:
    """The packed experts of one checkpoint. It holds no weights and keeps no file open; any thread may use it.

    Attributes:
        path: the packed file, all that a transfer needs besides `offset` and `row_bytes`.
        geometry: sizes of the routed part of the model.
        fingerprint: identifies the checkpoint's content (`Checkpoint.fingerprint`).
    """

    def __init__(self, path: Path, form: PackFormat):
        """Open an existing pack. Most callers want `open`, which makes it first where necessary.

        Raises:
            PackError: the file is not the pack that `form` describes, or it is truncated.
        """
        self.path, self.geometry, self.fingerprint = path, form.geometry, form.fingerprint
        self.row_bytes = form.geometry.expert.row_bytes
        self.offset = form.offset
        self._checksums = _read_checksums(path, form)

    @classmethod
    def open(
        cls,
        checkpoint_folder: str | Path,
        dtype: torch.dtype,
        pack_dir: str | Path,
        how: QuantFormat | None = None,
        *,
        verify: bool = False,
        progress: bool = True,
    ) -> ExpertStore:
        """The store of a checkpoint's experts as `dtype`, or quantised.

        They are packed into `pack_dir` if they are not yet, or were packed from another version of the checkpoint. A
        damaged pack is not silently replaced, since the disk may be failing.

        Args:
            checkpoint_folder: a Hugging Face checkpoint (safetensors).
            dtype: float32, float16 or bfloat16; the checkpoint's weights are converted.
            pack_dir: made if absent; one file of about the experts' size is written there.
            how: quantise the converted weights like this; None leaves them as they are.
            verify: read every expert and compare its checksum first.
            progress: show a bar while packing and verifying.

        Raises:
            CheckpointError, UnsupportedModelError, PackError: as `Checkpoint` and `pack_experts` do, and a PackError if
                the pack is truncated or (with `verify`) an expert is damaged; a KernelInputError if `how` does not fit them.
        """
        checkpoint = Checkpoint(checkpoint_folder)
        form = pack_format_of(checkpoint, dtype, how)
        path = pack_path(checkpoint.folder, form, Path(pack_dir))
        if not is_pack_of(path, form):
            log.info("packing the experts of %s into %s", checkpoint.folder, path)
            pack_experts(checkpoint, path, dtype, how, progress=progress)
        store = cls(path, form)
        if verify:
            store.verify(progress=progress)
        return store

    def read_row(self, key: ExpertKey) -> Tensor:
        """The packed row of one expert, uint8 [row_bytes], page-aligned as a slot is, its checksum verified.

        Raises:
            PackError: the file cannot be read, ends too early, or the row's checksum differs.
        """
        pages = allocate_pages(self.row_bytes, "reading one expert")
        offset = self.offset(key)
        try:
            with open(self.path, "rb", buffering=0) as file:
                n_read = _read_at(file.fileno(), memoryview(pages), offset)
        except OSError as error:
            raise PackError(f"{self._where(key)}: cannot be read: {error.strerror}") from error
        if n_read < self.row_bytes:
            raise PackError(f"{self._where(key)}: the file ends after {n_read} of {self.row_bytes} bytes; {_REMEDY}")
        self.check_row(key, pages)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def read_expert(self, key: ExpertKey) -> tuple[Tensor, Tensor]:
        """gate_up [2I, H] and down [H, I] of one expert, read and verified as by `read_row`."""
        return self.views(self.read_row(key))

    def check_row(self, key: ExpertKey, row: bytes | memoryview | mmap) -> None:
        """Verify a row in memory (`row_bytes` bytes, a slot's buffer for instance) against its checksum.

        Raises:
            PackError: they differ.
        """
        found, packed = zlib.crc32(row), int(self._checksums[key])
        if found != packed:
            raise PackError(f"{self._where(key)}: its CRC-32 is {found:08x}, {packed:08x} was packed; {_REMEDY}")

    def views(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """gate_up [2I, H] and down [H, I] of a row, uint8 [row_bytes]: without a copy, or dequantised."""
        return self.geometry.expert.reader(row)()

    def verify(self, *, progress: bool = True) -> None:
        """Read every expert and compare its checksum.

        Raises:
            PackError: the first damaged or unreadable expert.
        """
        with expert_progress("verifying experts", self.geometry, progress) as advance:
            for layer in range(self.geometry.n_layers):
                for expert in range(self.geometry.n_experts):
                    self.read_row(ExpertKey(layer, expert))
                    advance()

    def _where(self, key: ExpertKey) -> str:
        return f"{self.path}: layer {key.layer} expert {key.expert} at offset {self.offset(key)}"


_REMEDY = "the pack is damaged, remove it so that it is packed again"


def pack_path(checkpoint_folder: Path, form: PackFormat, pack_dir: Path) -> Path:
    """One name per checkpoint folder and format: a changed checkpoint replaces its pack instead of adding another."""
    folder = checkpoint_folder.resolve()
    place = hashlib.blake2b(os.fsencode(folder), digest_size=4).hexdigest()
    kind = form.geometry.expert.format_name.replace(" ", "_")
    return pack_dir / f"{folder.name}-{place}.{kind}.experts.safetensors"


def _read_checksums(path: Path, form: PackFormat) -> np.ndarray:
    """The checksum table, uint32 [L, E]."""
    if not is_pack_of(path, form):
        raise PackError(f"{path}: {_another_pack(path, form)}")
    size = path.stat().st_size
    if size != form.file_bytes:
        raise PackError(f"{path}: it has {size} bytes, {form.file_bytes} were packed; {_REMEDY}")
    geometry = form.geometry
    table = np.fromfile(path, dtype="<u4", count=geometry.n_total, offset=form.checksums_offset)
    return table.reshape(geometry.n_layers, geometry.n_experts)


def _another_pack(path: Path, form: PackFormat) -> str:
    if not path.is_file():
        return "it is missing"
    with open(path, "rb") as file:
        found, wanted = PackFormat.name_in(file.read(len(form.header))), form.geometry.expert.format_name
    if found != wanted:
        return f"its experts are {found}, {wanted} was asked for"
    return "it is the pack of another checkpoint, of another state of it, or of another version"


def _read_at(fd: int, into: memoryview, offset: int) -> int:
    """Fill `into` from `offset` on; returns the bytes read, fewer only where the file ends."""
    n_read = 0
    while n_read < len(into):
        n_more = os.preadv(fd, [into[n_read:]], offset + n_read)
        if n_more == 0:
            break
        n_read += n_more
    return n_read
