"""Transfers by native worker threads that read from a backing tier straight into slots."""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable, Sequence
from typing import cast

from prefetch.errors import CapacityError, ConfigError, TransferError
from prefetch.geometry import PAGE_BYTES, ExpertKey
from prefetch.transfers.base import Transfer, Transfers, TransferState
from prefetch.transfers.link import EmulatedLink
from prefetch.transfers.native import READ_RAISED, CheckFunction, NativeJob, address_of, library
from prefetch.transfers.sources import Source

STATES = tuple(TransferState)  # in the order of pool.c
FIRST_SETTLED = STATES.index(TransferState.DONE)
PATIENCE_S = 0.05  # how long a wait goes without looking for Ctrl-C


class Job(Transfer):
    """A transfer whose state lives in native memory, where the worker threads write it."""

    def __init__(self, key: ExpertKey, slot: int, native: NativeJob, transfers: ThreadTransfers):
        self.key, self.slot, self.n_bytes = key, slot, native.n_bytes
        self.native, self.address = native, ctypes.addressof(native)
        self._transfers = transfers

    @property
    def state(self) -> TransferState:
        return STATES[self.native.state]

    @property
    def settled(self) -> bool:
        return self.native.state >= FIRST_SETTLED

    @property
    def demand(self) -> bool:
        return bool(self.native.demand)

    @property
    def moved_bytes(self) -> int:
        return self.native.moved_bytes

    @property
    def submitted_s(self) -> float:
        return self.native.submitted_s

    @property
    def started_s(self) -> float:
        return self.native.started_s

    @property
    def finished_s(self) -> float:
        return self.native.finished_s

    @property
    def error(self) -> TransferError | None:
        return self._transfers.error_of(self) if self.state is TransferState.FAILED else None


class ThreadTransfers(Transfers):
    """Worker threads over two queues of transfers, demand before prefetch, each first in, first out (pool.c).

    A thread takes one chunk of the first transfer at a time, so that a demand load waits for no more than the chunks
    under way, and a large transfer is moved by several threads at once. With an emulated link only one chunk is on the
    link; which one is decided at the moment the link gets free.

    No prefetch begins while a demand load is under way: it would share the link with it.

    A cancelled transfer always ends as CANCELLED (or FAILED), even if its last bytes were just arriving.

    Args:
        source: the backing tier; it must stay open until these transfers are closed.
        slot_buffer: the bytes of a slot, `source.row_bytes` long, e.g. `SlotPool.buffer`: writable, or read by `check` alone.
        n_threads: worker threads.
        chunk_bytes: the most a demand load waits for on each thread; whole pages.
        slot_address: where a slot's bytes go; by default into its buffer.
        fence: the event after which a GPU has read a slot's last expert, 0 for none; asked at `submit`.
        link: paces every chunk, and is cut by `close`; None moves them as fast as the tier can.
        check: called with (key, row) when a row has arrived; it raises if the row is damaged. It takes the interpreter
            lock of the thread that moved the row.
    """

    def __init__(
        self,
        source: Source,
        slot_buffer: Callable[[int], memoryview],
        *,
        n_threads: int,
        chunk_bytes: int,
        slot_address: Callable[[int], int] | None = None,
        fence: Callable[[int], int] = lambda slot: 0,
        link: EmulatedLink | None = None,
        check: Callable[[ExpertKey, memoryview], None] | None = None,
    ):
        if n_threads < 1:
            raise ConfigError(f"tier.n_threads is {n_threads}; at least 1 is right")
        if chunk_bytes < 1 or chunk_bytes % PAGE_BYTES:
            raise ConfigError(f"tier.chunk_bytes is {chunk_bytes}; a multiple of {PAGE_BYTES} is right")
        self._source, self._slot_buffer, self._link, self._check = source, slot_buffer, link, check
        self._slot_address = slot_address or (lambda slot: address_of(slot_buffer(slot)))
        self._fence = fence
        self._under_way: dict[int, Job] = {}  # by address; keeps native memory alive until its job has settled
        self._slot_addresses: dict[int, int] = {}
        self._raised: dict[int, BaseException] = {}  # by `check`, by address
        self._interrupt: BaseException | None = None
        self._check_callback = CheckFunction(self._check_row) if check is not None else None
        self._closed = False
        self._lib = library()
        link_address = None if link is None else ctypes.addressof(link)
        context = ctypes.addressof(source.context)
        self._memory = ctypes.create_string_buffer(self._lib.pool_bytes(n_threads))
        self._pool = ctypes.addressof(self._memory)
        _open.add(self)
        reader, check_row = source.reader, self._check_callback
        n_started = self._lib.pool_open(self._pool, reader, context, check_row, link_address, chunk_bytes, n_threads)
        if n_started < n_threads:
            self.close()
            raise CapacityError(f"the system starts {n_started} of {n_threads} threads; lower tier.n_threads")
        self._queued_bytes = ctypes.c_int64.from_address(self._lib.pool_queued_bytes(self._pool))

    def submit(self, key: ExpertKey, slot: int, *, demand: bool) -> Transfer:
        if self._closed:
            raise TransferError(f"layer {key[0]} expert {key[1]} cannot be moved: the transfers are closed")
        address = self._slot_addresses.get(slot)
        if address is None:
            address = self._slot_addresses[slot] = self._slot_address(slot)
        source = self._source
        native = NativeJob(source.offset_of(key), source.row_bytes, address, self._fence(slot), demand=demand)
        job = Job(key, slot, native, self)
        self._forget_settled()
        self._under_way[job.address] = job
        self._lib.pool_submit(self._pool, job.address)
        return job

    def promote(self, transfer: Transfer) -> None:
        self._lib.pool_promote(self._pool, cast(Job, transfer).address)

    def cancel(self, transfer: Transfer) -> None:
        self._lib.pool_cancel(self._pool, cast(Job, transfer).address)

    def wait_any(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        jobs = cast(Sequence[Job], transfers)
        addresses = (ctypes.c_void_p * len(jobs))(*(job.address for job in jobs))
        while jobs and not self._lib.pool_wait_any(self._pool, addresses, len(jobs), PATIENCE_S):
            pass  # back in Python once in a while, where Ctrl-C is noticed
        if self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            raise interrupt
        return [transfer for transfer in transfers if transfer.settled]

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes.value

    def close(self) -> None:
        self._closed = True
        self._lib.pool_close(self._pool)
        _open.discard(self)

    def _forget_settled(self) -> None:
        while self._under_way:
            oldest = next(iter(self._under_way.values()))
            if not oldest.settled:
                return
            del self._under_way[oldest.address]

    def error_of(self, job: Job) -> TransferError:
        """Why `job` failed."""
        native = job.native
        if native.error == READ_RAISED:
            problem = self._raised[job.address]
            reason = str(problem) or repr(problem)
            error = TransferError(f"layer {job.key[0]} expert {job.key[1]} on its way into slot {job.slot}: {reason}")
            error.__cause__ = problem
            return error
        return self._source.error(job.key, native.error_start, native.error, native.n_read, job.n_bytes)

    def _check_row(self, native: ctypes._Pointer[NativeJob]) -> int:
        """Called by the thread that moved the last chunk of a row."""
        job = self._under_way[ctypes.addressof(native.contents)]
        assert self._check is not None
        try:
            self._check(job.key, self._slot_buffer(job.slot))
        except BaseException as problem:
            self._raised[job.address] = problem
            if not isinstance(problem, Exception):  # Ctrl-C while a waiting thread was helping
                self._interrupt = problem
            return READ_RAISED
        return 0


_open: set[ThreadTransfers] = set()


@atexit.register
def _close_all() -> None:
    """Threads must not outlive the memory they work in. (A finalizer would do, but swallows a Ctrl-C that comes meanwhile.)"""
    for transfers in list(_open):
        transfers.close()
