"""A backing tier in memory whose chunks move only when the test says so."""

import ctypes
import errno
import random
import threading
from collections.abc import Callable

from prefetch.geometry import ExpertKey
from prefetch.transfers.native import NativeMemory, ReadFunction
from prefetch.transfers.sources import Source

N_EXPERTS = 1000  # of a layer: the "offset" of a row numbers it
PATIENCE_S = 20.0  # only a broken implementation takes that long


def row_of(key: ExpertKey, n_bytes: int) -> bytes:
    return random.Random(1000 * key[0] + key[1]).randbytes(n_bytes)


class GatedSource(Source):
    """Rows are `row_of`. A read of a gated key announces itself in `reads`, then waits for one `allow`."""

    def __init__(self, row_bytes: int, gated: Callable[[ExpertKey], bool] = lambda key: True):
        super().__init__("a gated source", lambda key: N_EXPERTS * key[0] + key[1], row_bytes)
        self.reads: list[tuple[ExpertKey, int]] = []  # (key, start) in the order in which threads took them
        self.n_inside = self.most_inside = 0
        self.closed = False
        self._gated = gated
        self._changed = threading.Condition()
        self._permits = 0.0
        self.context = NativeMemory()
        self.reader = ReadFunction(self._read)

    def _read(self, context, job, start, n_bytes, into, n_read) -> int:
        key = ExpertKey(*divmod(job.contents.offset, N_EXPERTS))
        with self._changed:
            self.reads.append((key, start))
            self.n_inside += 1
            self.most_inside = max(self.most_inside, self.n_inside)
            self._changed.notify_all()
            if self._gated(key):
                if not self._changed.wait_for(lambda: self._permits > 0, PATIENCE_S):
                    return errno.ETIMEDOUT
                self._permits -= 1
        ctypes.memmove(into, row_of(key, self.row_bytes)[start : start + n_bytes], n_bytes)
        with self._changed:
            self.n_inside -= 1
        return 0

    def row(self, key: ExpertKey) -> memoryview:
        return memoryview(row_of(key, self.row_bytes))

    def close(self):
        self.closed = True

    def allow(self, n_chunks: float = 1) -> None:
        with self._changed:
            self._permits += n_chunks
            self._changed.notify_all()

    def open(self) -> None:
        self.allow(float("inf"))

    def await_reads(self, n_reads: int) -> list[tuple[ExpertKey, int]]:
        """The first `n_reads` reads, once there are that many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.reads) >= n_reads, PATIENCE_S), self.reads
            return self.reads[:n_reads]
