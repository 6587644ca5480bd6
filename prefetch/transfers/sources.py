"""Backing tiers: where every expert's row lies, and how its bytes get from there into memory."""

from __future__ import annotations

import ctypes
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
from prefetch.transfers.native import READ_SHORT, NativeDisk, NativeJob, NativeMemory, address_of, library

log = logging.getLogger(__name__)

LOAD_BYTES = 16 << 20  # one read while a whole file is loaded
QUIET_S = 2.0  # a load that takes longer shows its progress


class Source(ABC):
    """One backing tier: `reader`, a function of pool.c's type `read_fn`, and what it takes. Several threads may read at once.

    Attributes:
        path: the packed file.
        row_bytes: bytes of one expert's row.
        offset_of: where the row of an expert begins.
        reader: the native function that reads; `context` is its first argument.
    """

    reader: Callable[..., int]
    context: ctypes.Structure

    def __init__(self, path: str | Path, offset_of: Callable[[ExpertKey], int], row_bytes: int):
        self.path = Path(path)
        self.offset_of, self.row_bytes = offset_of, row_bytes

    def read_into(self, key: ExpertKey, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of the row of `key` from byte `start` on; other threads run meanwhile.

        Raises:
            TransferError: the bytes cannot be read; `buffer` then holds anything.
        """
        self.read_to(key, start, address_of(buffer), len(buffer))

    def read_to(self, key: ExpertKey, start: int, address: int, n_bytes: int) -> None:
        """The same, to `address`: where slots are, which is not always memory of the CPU's."""
        job, n_read = NativeJob(offset=self.offset_of(key)), ctypes.c_int64()
        context, row = ctypes.addressof(self.context), ctypes.addressof(job)
        code = self.reader(context, row, start, n_bytes, address, ctypes.addressof(n_read))
        if code:
            raise self.error(key, start, code, n_read.value, n_bytes)

    def error(self, key: ExpertKey, start: int, code: int, n_read: int, n_wanted: int) -> TransferError:
        """What it means that reading `n_wanted` bytes from byte `start` of a row ended with `code` after `n_read` bytes."""
        where = f"{self.path}: cannot read layer {key[0]} expert {key[1]} at offset {self.offset_of(key) + start}"
        if code == READ_SHORT:
            return TransferError(f"{where}: {n_read} of {n_wanted} bytes are there; {self.when_short}")
        return TransferError(f"{where}: {os.strerror(code)}")

    when_short = "the file is truncated, remove it so that it is packed again"

    @abstractmethod
    def row(self, key: ExpertKey) -> memoryview:
        """The row of `key` where the CPU can read it: no copy if the tier is memory.

        Raises:
            TransferError: it cannot be read.
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
        super().__init__(path, offset_of, row_bytes)
        self.reader = library().read_disk
        fd, self.direct = _open_direct(self.path)
        self.context = NativeDisk(fd, self.direct)
        if not self.direct:
            log.warning(
                "%s: no O_DIRECT on this file system: reads go through the page cache, their times are not a disk's",
                path,
            )

    def row(self, key: ExpertKey) -> memoryview:
        buffer = memoryview(allocate_pages(self.row_bytes, "reading one expert"))
        self.read_into(key, 0, buffer)
        return buffer

    def close(self) -> None:
        fd, self.context.fd = self.context.fd, -1  # so that a late read fails rather than reads another file
        if fd >= 0:
            os.close(fd)


class HostSource(Source):
    """Rows copied from RAM, which holds the whole packed file. Loading it is all the file is needed for."""

    when_short = "the file is truncated (or the tier closed), remove it so that it is packed again"

    def __init__(self, path: str | Path, offset_of: Callable[[ExpertKey], int], row_bytes: int):
        super().__init__(path, offset_of, row_bytes)
        self.reader = library().read_memory
        self._bytes = self.load()
        self.context = self.memory = NativeMemory(self._bytes.ctypes.data, self._bytes.size)

    def load(self) -> np.ndarray:
        """All bytes of the file, uint8 [file size]."""
        return _load(self.path)

    def row(self, key: ExpertKey) -> memoryview:
        start = self.offset_of(key)
        there = max(0, self.memory.n_bytes - start)
        if there < self.row_bytes:
            raise self.error(key, 0, READ_SHORT, there, self.row_bytes)
        return self._bytes.data[start : start + self.row_bytes]

    def rows_from(self, key: ExpertKey, n_rows: int) -> np.ndarray:
        """uint8 [n_rows, row_bytes]: the row of `key` and those behind it in the file, without a copy."""
        start = self.offset_of(key)
        return self._bytes[start : start + n_rows * self.row_bytes].reshape(n_rows, self.row_bytes)

    def close(self) -> None:
        self.memory.n_bytes = 0
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
