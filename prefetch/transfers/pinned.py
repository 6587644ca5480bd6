"""The backing tier of a GPU: all experts in pinned host memory, and what the copies out of it have to wait for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from prefetch.errors import CapacityError, ConfigError, TransferError
from prefetch.geometry import ExpertKey
from prefetch.transfers.cuda_driver import CudaDriver
from prefetch.transfers.native import GPU_ERROR, NativeGpu, library
from prefetch.transfers.sources import HostSource

MOST_STREAMS = 64  # as in pool.c


class PinnedSource(HostSource):
    """Rows in page-locked RAM, copied to a GPU by its copy engine, or read there by its kernels.

    The packed file's bytes are locked where they were loaded, at their exact size. Each thread that moves a chunk has a stream
    of its own and waits for the chunk: a prefetch can be cancelled, and overtaken, between any two.

    Args:
        n_threads: how many threads of `ThreadTransfers` will move chunks. Two keep the link busy between chunks.

    Raises:
        CapacityError: the system does not lock that much memory.
    """

    def __init__(
        self, path: str | Path, offset_of: Callable[[ExpertKey], int], row_bytes: int, driver: CudaDriver, n_threads: int
    ):
        if n_threads >= MOST_STREAMS:
            raise ConfigError(f"tier.n_threads is {n_threads}; on a GPU fewer than {MOST_STREAMS} are right")
        super().__init__(path, offset_of, row_bytes)
        self.driver = driver
        self._streams: list[int] = []
        try:
            self._mapped = driver.pin(self.memory.address, self.memory.n_bytes)
        except TransferError as error:
            n_bytes = self.memory.n_bytes
            super().close()
            raise CapacityError(f"{path}: {n_bytes / 1e9:.2f} GB of RAM cannot be pinned: {error}") from error
        try:
            for _ in range(n_threads + 1):  # the waiting thread may move chunks too
                self._streams.append(driver.new_stream())
        except TransferError:
            self._let_go()
            raise
        self._handles = (ctypes.c_void_p * len(self._streams))(*self._streams)
        functions = ("cuCtxSetCurrent", "cuStreamWaitEvent", "cuMemcpyHtoDAsync_v2", "cuStreamSynchronize")
        self.reader = library().copy_to_gpu
        self.context = NativeGpu(
            self.memory, driver.context, self._handles, len(self._streams), 0, *(driver.address_of(name) for name in functions)
        )

    def mapped_address(self, key: ExpertKey) -> int:
        """Where a kernel finds the row of `key`, across the link."""
        return self._mapped + self.offset_of(key)

    def error(self, key: ExpertKey, start: int, code: int, n_read: int, n_wanted: int) -> TransferError:
        if code > GPU_ERROR:
            return super().error(key, start, code, n_read, n_wanted)
        return TransferError(
            f"layer {key[0]} expert {key[1]} cannot be copied to the GPU: {self.driver.error_string(GPU_ERROR - code)} "
            f"(error {GPU_ERROR - code}), bytes {start} to {start + n_wanted} of its row"
        )

    def close(self) -> None:
        if self.memory.n_bytes:
            self.context.host.n_bytes = 0  # a late read fails
            self._let_go()

    def _let_go(self) -> None:
        """Memory that is freed while it is locked would stay locked."""
        for stream in self._streams:
            self.driver.destroy_stream(stream)
        self.driver.unpin(self.memory.address)
        super().close()


class SlotFences:
    """One event a slot: a copy into it waits until the kernels that were given its last expert are done.

    The host takes a slot back as soon as it has enqueued the work that reads it. So whoever releases a slot records its event
    on the compute stream, and the copy that comes next waits for it on its own stream, without the host.
    """

    def __init__(self, driver: CudaDriver, n_slots: int, compute_stream: Callable[[], int]):
        self._driver, self._compute_stream = driver, compute_stream
        self._events: list[int] = []
        try:
            for _ in range(n_slots):
                self._events.append(driver.new_event())
        except TransferError:
            self.close()
            raise

    def raise_at(self, slot: int) -> None:
        """Everything enqueued so far may read `slot`: hold back the next copy into it until that is done."""
        self._driver.record(self._events[slot], self._compute_stream())

    def event(self, slot: int) -> int:
        """What a copy into `slot` has to wait for."""
        return self._events[slot]

    def close(self) -> None:
        """Safe to call twice; no copy may be under way."""
        for event in self._events:
            self._driver.destroy_event(event)
        self._events = []
