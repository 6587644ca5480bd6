"""Backing tiers: where every expert's row lies, and how its bytes get from there into memory."""

from __future__ import annotations

import errno
import io
import logging
import mmap
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from prefetch.errors import TransferError
from prefetch.geometry import PAGE_BYTES, ExpertKey
from prefetch.memory import allocate_pages

log = logging.getLogger(__name__)

LOAD_BYTES = 16 << 20  # one read while a whole file is loaded
QUIET_S = 2.0  # a load that takes longer shows its progress


class Source(ABC):
    """One backing tier. Several threads may call `read_into` at once; it lets other threads run while it copies.

    Attributes:
        path: the packed file.
        row_bytes: bytes of one expert's row.
    """

    path: Path
    row_bytes: int

    @abstractmethod
    def read_into(self, key: ExpertKey, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of the row of `key` from byte `start` on.

        Raises:
            TransferError: the bytes cannot be read; `buffer` then holds anything.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the file or memory. Safe to call twice."""


class DiskSource(Source):
    """Rows read from the packed file, past the page cache (O_DIRECT) where the file system can do that.

    Direct reads want offsets, lengths and buffers aligned to pages, as rows and slots are.

    Attributes:
        direct: whether reads bypass the page cache. Where they do not, they come to measure RAM.
    """

    def __init__(self, path: str | Path, offset_of: Callable[[ExpertKey], int], row_bytes: int):
        self.path = Path(path)
        self.row_bytes = row_bytes
        self._offset_of = offset_of
        self._fd, self.direct = _open_direct(self.path)
        if not self.direct:
            log.warning(
                "%s: no O_DIRECT on this file system: reads go through the page cache, their times are not a disk's",
                path,
            )

    def read_into(self, key: ExpertKey, start: int, buffer: memoryview) -> None:
        offset = self._offset_of(key) + start
        try:
            n_read = os.preadv(self._fd, [buffer], offset)  # retried by Python when a signal interrupts it
            if n_read < len(buffer):
                self._read_rest(key, offset, buffer, n_read)
        except OSError as error:
            raise TransferError(f"{self._where(key, offset)}: {error.strerror}") from error

    def _read_rest(self, key: ExpertKey, offset: int, buffer: memoryview, n_read: int) -> None:
        """A read may stop early; only at the end of the file it returns nothing, or (direct) part of a page."""
        while n_read < len(buffer):
            at_end = self.direct and n_read % PAGE_BYTES
            n_more = 0 if at_end else os.preadv(self._fd, [buffer[n_read:]], offset + n_read)
            if n_more == 0:
                raise TransferError(
                    f"{self._where(key, offset)}: the file ends after {n_read} of {len(buffer)} bytes; "
                    "it is truncated, remove it so that it is packed again"
                )
            n_read += n_more

    def _where(self, key: ExpertKey, offset: int) -> str:
        return f"{self.path}: cannot read layer {key[0]} expert {key[1]} at offset {offset}"

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1  # so that a late read fails rather than reads another file


class HostSource(Source):
    """Rows copied from RAM, which holds the whole packed file. Loading it is all the file is needed for."""

    def __init__(self, path: str | Path, offset_of: Callable[[ExpertKey], int], row_bytes: int):
        self.path = Path(path)
        self.row_bytes = row_bytes
        self._offset_of = offset_of
        self._bytes = _load(self.path)

    def read_into(self, key: ExpertKey, start: int, buffer: memoryview) -> None:
        offset = self._offset_of(key) + start
        row = self._bytes[offset : offset + len(buffer)]
        if len(row) < len(buffer):
            raise TransferError(
                f"{self.path}: layer {key[0]} expert {key[1]} at offset {offset}: "
                f"{len(row)} of {len(buffer)} bytes are there; "
                "the file is truncated (or the tier closed), remove it so that it is packed again"
            )
        np.copyto(np.frombuffer(buffer, dtype=np.uint8), row)  # unlike a slice assignment, this releases the GIL

    def close(self) -> None:
        self._bytes = np.empty(0, dtype=np.uint8)


def _open_direct(path: Path) -> tuple[int, bool]:
    """A file descriptor, and whether it reads past the page cache. Some file systems refuse only when read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        try:
            os.preadv(fd, [mmap.mmap(-1, PAGE_BYTES)], 0)
            return fd, True
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise TransferError(f"{path}: cannot open the packed experts: {error.strerror}") from error
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False


def _load(path: Path) -> np.ndarray:
    """The bytes of a file in anonymous memory, uint8 [file size], read once."""
    try:
        with open(path, "rb", buffering=0) as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes == 0:
                raise TransferError(f"{path}: the file of packed experts is empty; remove it")
            pages = memoryview(allocate_pages(n_bytes, f"holding {path} in RAM (tier=host; tier=disk does without)"))
            _read_showing_progress(file, pages)
    except OSError as error:
        raise TransferError(f"{path}: cannot load the packed experts: {error.strerror}") from error
    return np.frombuffer(pages, dtype=np.uint8)


def _read_showing_progress(file: io.FileIO, pages: memoryview) -> None:
    """Fill `pages` from `file`; a progress bar appears if that takes a while."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    task = progress.add_task("loading experts into RAM", total=len(pages))
    began_s = time.perf_counter()
    try:
        while not progress.finished:
            done = int(progress.tasks[0].completed)
            n_read = file.readinto(pages[done : done + LOAD_BYTES])
            if not n_read:
                raise TransferError(f"{file.name}: it shrank while being loaded: {done} of {len(pages)} bytes")
            progress.advance(task, n_read)
            if not progress.live.is_started and time.perf_counter() - began_s > QUIET_S:
                progress.start()
    finally:
        if progress.live.is_started:
            progress.stop()
