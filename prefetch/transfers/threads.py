"""Transfers by worker threads that read from a backing tier straight into slots."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from prefetch.errors import ConfigError, TransferError
from prefetch.geometry import PAGE_BYTES, ExpertKey
from prefetch.transfers.base import Transfer, Transfers, TransferState
from prefetch.transfers.link import EmulatedLink
from prefetch.transfers.sources import Source


@dataclass(eq=False)
class Job(Transfer):
    """A transfer as the queues see it. The lock of `ThreadTransfers` guards every field."""

    next_start: int = 0  # bytes handed out to threads so far
    n_running: int = 0  # chunks under way
    stopping: bool = False  # cancelled or failed: no further chunk is handed out


class Chunk(NamedTuple):
    """A piece of a transfer, handed to one thread."""

    job: Job
    start: int
    end: int
    due_s: float  # when an emulated link delivers it; 0 without one


class ThreadTransfers(Transfers):
    """Worker threads over two queues of transfers, demand before prefetch, each first in, first out.

    A thread takes one chunk of the first transfer at a time, so that a demand load waits for no more than the chunks
    under way, and a large transfer is moved by several threads at once. With an emulated link only one chunk is on the
    link; which one is decided at the moment the link gets free.

    A cancelled transfer always ends as CANCELLED (or FAILED), even if its last bytes were just arriving.

    `_lock` guards the queues and every transfer. Reading `state` needs no lock: it is written last.

    Args:
        source: the backing tier; closed by `close`.
        slot_buffer: the writable bytes of a slot, `source.row_bytes` long, e.g. `SlotPool.buffer`.
        n_threads: worker threads.
        chunk_bytes: the most a demand load waits for on each thread; whole pages.
        link: paces every chunk, and is cut by `close`; None moves them as fast as the tier can.
        check: called with (key, row) when a row has arrived; it raises if the row is damaged.
    """

    def __init__(
        self,
        source: Source,
        slot_buffer: Callable[[int], memoryview],
        *,
        n_threads: int,
        chunk_bytes: int,
        link: EmulatedLink | None = None,
        check: Callable[[ExpertKey, memoryview], None] | None = None,
    ):
        if n_threads < 1:
            raise ConfigError(f"tier.n_threads is {n_threads}; at least 1 is right")
        if chunk_bytes < 1 or chunk_bytes % PAGE_BYTES:
            raise ConfigError(f"tier.chunk_bytes is {chunk_bytes}; a multiple of {PAGE_BYTES} is right")
        self._source, self._slot_buffer = source, slot_buffer
        self._chunk_bytes = chunk_bytes
        self._link, self._check = link, check
        self._link_taken = False
        self._closed = False
        self._queued_bytes = 0
        self._demands: deque[Job] = deque()
        self._prefetches: deque[Job] = deque()
        self._unsettled: set[Job] = set()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # there may be a chunk to move
        self._news = threading.Condition(self._lock)  # a transfer settled
        self._threads = [threading.Thread(target=self._run, name=f"transfers-{i}", daemon=True) for i in range(n_threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, key: ExpertKey, slot: int, *, demand: bool) -> Transfer:
        n_bytes = self._source.row_bytes
        job = Job(key, slot, demand, n_bytes, submitted_s=time.perf_counter())
        with self._lock:
            if self._closed:
                raise TransferError(f"layer {key[0]} expert {key[1]} cannot be moved: the transfers are closed")
            (self._demands if demand else self._prefetches).append(job)
            self._unsettled.add(job)
            self._queued_bytes += n_bytes
            self._work.notify(-(-n_bytes // self._chunk_bytes))
        return job

    def promote(self, transfer: Transfer) -> None:
        with self._lock:
            if not transfer.demand and not transfer.settled:
                transfer.demand = True
                self._demands.append(cast(Job, transfer))  # when its old place comes up, no chunk of it will be left

    def cancel(self, transfer: Transfer) -> None:
        job = cast(Job, transfer)
        with self._lock:
            if not job.settled:
                self._stop(job)
                self._settle_if_quiet(job)

    def wait_any(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        while True:
            settled = [transfer for transfer in transfers if transfer.settled]
            if settled or not transfers:
                return settled
            with self._lock:
                chunk = self._take(self._demands)
                if chunk is None and not any(transfer.settled for transfer in transfers):
                    self._news.wait()
            if chunk is not None:
                self._move(chunk)

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for job in list(self._unsettled):
                self._stop(job)
                self._settle_if_quiet(job)
            self._work.notify_all()
        if self._link is not None:
            self._link.cut()
        for thread in self._threads:
            thread.join()
        with self._lock:  # a chunk that Ctrl-C took away from a waiting thread never comes back
            for job in list(self._unsettled):
                self._settle(job, TransferState.CANCELLED)
        self._source.close()

    def _run(self) -> None:
        while True:
            with self._lock:
                while (chunk := self._take(self._demands) or self._take(self._prefetches)) is None:
                    if self._closed:
                        return
                    self._work.wait()
            self._move(chunk)

    def _take(self, queue: deque[Job]) -> Chunk | None:
        """The next chunk of the first transfer in `queue` that has one left; None also while the link is taken."""
        if self._link_taken:
            return None
        while queue and queue[0].next_start == queue[0].n_bytes:
            queue.popleft()
        if not queue:
            return None
        job = queue[0]
        start = job.next_start
        end = min(start + self._chunk_bytes, job.n_bytes)
        due_s = 0.0
        if self._link is not None:
            self._link_taken = True
            due_s = self._link.reserve(end - start, ready_s=job.submitted_s)
        job.next_start = end
        job.n_running += 1
        if start == 0:
            job.started_s = time.perf_counter()
            job.state = TransferState.RUNNING
        return Chunk(job, start, end, due_s)

    def _move(self, chunk: Chunk) -> None:
        """Bring the chunk's bytes into its slot and account for them; errors end up in the transfer."""
        job, start, end, due_s = chunk
        error = None
        try:
            buffer = self._slot_buffer(job.slot)
            self._source.read_into(job.key, start, buffer if end - start == len(buffer) else buffer[start:end])
            if self._link is not None:
                self._link.deliver(due_s)
        except Exception as problem:
            error = _transfer_error(job, problem)
        except BaseException as interrupt:  # Ctrl-C reached a waiting thread while it was helping
            self._finish(chunk, _transfer_error(job, interrupt))
            raise
        self._finish(chunk, error)

    def _finish(self, chunk: Chunk, error: TransferError | None) -> None:
        job, n_bytes = chunk.job, chunk.end - chunk.start
        with self._lock:
            self._queued_bytes -= n_bytes
            if error is None:
                job.moved_bytes += n_bytes
            if self._link is not None:
                self._link_taken = False
                self._work.notify()
            unchecked = self._check is not None and job.moved_bytes == job.n_bytes and not job.stopping
            if not unchecked:
                self._leave(job, error)
        if unchecked:
            self._verify(job)

    def _verify(self, job: Job) -> None:
        """Check a row that has arrived. It still counts as running, so that its slot stays its own meanwhile."""
        assert self._check is not None
        error = None
        try:
            self._check(job.key, self._slot_buffer(job.slot))
        except BaseException as problem:
            error = _transfer_error(job, problem)
            if not isinstance(problem, Exception):
                raise
        finally:
            with self._lock:
                self._leave(job, error)

    def _leave(self, job: Job, error: TransferError | None) -> None:
        """A thread is done with its chunk of `job`."""
        job.n_running -= 1
        if error is not None:
            job.error = job.error or error
            self._stop(job)
        self._settle_if_quiet(job)

    def _stop(self, job: Job) -> None:
        """Hand out no further chunk of `job`."""
        self._queued_bytes -= job.n_bytes - job.next_start
        job.next_start = job.n_bytes
        job.stopping = True

    def _settle_if_quiet(self, job: Job) -> None:
        if job.n_running == 0 and job.next_start == job.n_bytes:
            ended = TransferState.CANCELLED if job.stopping else TransferState.DONE
            self._settle(job, TransferState.FAILED if job.error else ended)

    def _settle(self, job: Job, state: TransferState) -> None:
        job.finished_s = time.perf_counter()
        job.state = state
        self._unsettled.discard(job)
        self._news.notify_all()


def _transfer_error(job: Job, problem: BaseException) -> TransferError:
    """`problem` as the transfer's error, naming the expert."""
    if isinstance(problem, TransferError):
        return problem
    reason = str(problem) or repr(problem)
    error = TransferError(f"layer {job.key[0]} expert {job.key[1]} on its way into slot {job.slot}: {reason}")
    error.__cause__ = problem
    return error
