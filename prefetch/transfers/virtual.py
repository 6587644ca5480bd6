"""Transfers over a link that exists only in arithmetic: the same rules as the worker threads', in virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from typing import cast

from prefetch.clock import VirtualClock
from prefetch.errors import ConfigError, TransferError
from prefetch.geometry import ExpertKey
from prefetch.transfers.base import Transfer, Transfers, TransferState


class VirtualTransfer(Transfer):
    """A transfer over a virtual link. Times are those of the link's clock; what is read here holds at its present.

    Attributes:
        handed_out_bytes: of the chunks that have begun; `n_bytes` once it is cancelled, since none will begin any more.
    """

    __slots__ = (
        "key", "slot", "n_bytes", "demand", "submitted_s",
        "owner", "handed_out_bytes", "cancelled", "moved_bytes_", "started_s_", "finished_s_",
    )  # fmt: skip

    demand: bool
    submitted_s: float

    def __init__(self, owner: VirtualTransfers, key: ExpertKey, slot: int, n_bytes: int, demand: bool, submitted_s: float):
        self.key, self.slot, self.n_bytes, self.demand, self.submitted_s = key, slot, n_bytes, demand, submitted_s
        self.owner = owner
        self.handed_out_bytes = 0
        self.cancelled = False
        # As of the last event on the link: the properties of the same names bring the link up to the present first.
        self.moved_bytes_ = 0
        self.started_s_ = self.finished_s_ = 0.0

    @property
    def state(self) -> TransferState:
        self.owner.catch_up()
        if self.finished_s_:
            return TransferState.CANCELLED if self.cancelled else TransferState.DONE
        return TransferState.RUNNING if self.started_s_ else TransferState.QUEUED

    @property
    def settled(self) -> bool:
        self.owner.catch_up()
        return self.finished_s_ > 0.0

    @property
    def moved_bytes(self) -> int:
        self.owner.catch_up()
        return self.moved_bytes_

    @property
    def started_s(self) -> float:
        self.owner.catch_up()
        return self.started_s_

    @property
    def finished_s(self) -> float:
        self.owner.catch_up()
        return self.finished_s_

    @property
    def error(self) -> TransferError | None:
        return None  # arithmetic does not fail


class VirtualTransfers(Transfers):
    """Two queues of transfers over one serial link, demand before prefetch, each first in, first out; no bytes and no threads.

    It follows `ThreadTransfers` over an `EmulatedLink`: a chunk occupies the link for `latency_s + n_bytes / bytes_per_s`, and which
    one comes next is decided at the moment the link gets free. Time passes only on the clock; every look at a transfer or at
    `queued_bytes` first does what the link has done until now.

    Calls at one instant count in the order in which they are made, after the link's own events of that instant: a chunk that is due
    has arrived and the next one in the queues has begun, so that a demand load submitted now waits for it.

    Args:
        clock: the present; `wait_any` advances it.
        row_bytes: what each transfer moves.
        bytes_per_s: bandwidth of the link.
        latency_s: what each chunk costs beside its bytes.
        chunk_bytes: the most a demand load waits for.

    Raises:
        ConfigError: the link is impossible.
    """

    def __init__(self, clock: VirtualClock, *, row_bytes: int, bytes_per_s: float, latency_s: float, chunk_bytes: int):
        if row_bytes < 1:
            raise ConfigError(f"row_bytes is {row_bytes}; a transfer moves 1 byte at least")
        if not bytes_per_s > 0:
            raise ConfigError(f"machine.link.bytes_per_s is {bytes_per_s}; a bandwidth above 0 is right")
        if not 0 <= latency_s < inf:
            raise ConfigError(f"machine.link.latency_s is {latency_s}; 0 or more seconds are right")
        if chunk_bytes < 1:
            raise ConfigError(f"machine.link.chunk_bytes is {chunk_bytes}; at least 1 is right")
        self.clock, self.row_bytes, self.chunk_bytes = clock, row_bytes, chunk_bytes
        self.bytes_per_s, self.latency_s = bytes_per_s, latency_s
        # Whatever has no chunks left stays in its queue until it comes to the front. What was promoted is in both: it has no chunks
        # left when a prefetch's turn comes, since the demand loads went first.
        self._demands: deque[VirtualTransfer] = deque()
        self._prefetches: deque[VirtualTransfer] = deque()
        self._under_way: VirtualTransfer | None = None  # has a chunk on the link
        self._under_way_bytes = 0
        self._due_s = inf  # when that chunk arrives
        self._queued_bytes = 0
        self._closed = False

    def submit(self, key: ExpertKey, slot: int, *, demand: bool) -> Transfer:
        if self._closed:
            raise TransferError(f"layer {key[0]} expert {key[1]} cannot be moved: the transfers are closed")
        self.catch_up()
        now_s = self.clock()
        transfer = VirtualTransfer(self, key, slot, self.row_bytes, demand, now_s)
        (self._demands if demand else self._prefetches).append(transfer)
        self._queued_bytes += self.row_bytes
        if self._under_way is None:
            self._begin_chunk(now_s)
        return transfer

    def promote(self, transfer: Transfer) -> None:
        self.catch_up()
        promoted = cast(VirtualTransfer, transfer)
        if not promoted.demand and not promoted.finished_s_:
            promoted.demand = True
            self._demands.append(promoted)

    def cancel(self, transfer: Transfer) -> None:
        self.catch_up()
        cancelled = cast(VirtualTransfer, transfer)
        if cancelled.finished_s_:
            return
        self._queued_bytes -= cancelled.n_bytes - cancelled.handed_out_bytes
        cancelled.handed_out_bytes = cancelled.n_bytes
        cancelled.cancelled = True
        if cancelled is not self._under_way:
            cancelled.finished_s_ = self.clock()

    def wait_any(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        """Let time pass until at least one of `transfers` has settled; returns all of them that have, in the order given.

        Raises:
            ValueError: none of them is on this link: they would never settle.
        """
        self.catch_up()
        waited = cast(Sequence[VirtualTransfer], transfers)
        settled: list[Transfer] = [transfer for transfer in waited if transfer.finished_s_]
        if settled or not waited:
            return settled
        if not any(transfer.owner is self for transfer in waited):
            raise ValueError("none of the transfers waited for is on this link: they would never settle")
        while True:
            due_s, arrived = self._due_s, self._end_chunk()
            if arrived.finished_s_ and arrived in waited:
                break
        self.clock.advance_to(due_s)
        return [transfer for transfer in waited if transfer.finished_s_]

    @property
    def queued_bytes(self) -> int:
        self.catch_up()
        return self._queued_bytes

    def close(self) -> None:
        """Cancel everything. A chunk under way arrives at once, as over an `EmulatedLink` that is cut."""
        self._closed = True
        for transfer in (*self._demands, *self._prefetches):  # what is on the link is still at the front of its queue
            self.cancel(transfer)
        if self._under_way is not None:
            self._due_s = self.clock()
            self.catch_up()

    def catch_up(self) -> None:
        """Do what the link has done until now."""
        now_s = self.clock()
        while self._due_s <= now_s:
            self._end_chunk()

    def _end_chunk(self) -> VirtualTransfer:
        """The chunk under way arrives, and the next one begins. Returns the transfer that it belongs to."""
        due_s, transfer = self._due_s, cast(VirtualTransfer, self._under_way)
        transfer.moved_bytes_ += self._under_way_bytes
        self._queued_bytes -= self._under_way_bytes
        if transfer.handed_out_bytes == transfer.n_bytes:
            transfer.finished_s_ = due_s
        self._begin_chunk(due_s)
        return transfer

    def _begin_chunk(self, now_s: float) -> None:
        """The link is free: put the next chunk on it, if there is one."""
        transfer = self._under_way = self._next_transfer()
        if transfer is None:
            self._due_s = inf
            return
        start = transfer.handed_out_bytes
        n_bytes = self._under_way_bytes = min(self.chunk_bytes, transfer.n_bytes - start)
        transfer.handed_out_bytes = start + n_bytes
        if not start:
            transfer.started_s_ = now_s
        self._due_s = now_s + self.latency_s + n_bytes / self.bytes_per_s

    def _next_transfer(self) -> VirtualTransfer | None:
        """The first demand load with chunks left, else the first such prefetch."""
        for queue in (self._demands, self._prefetches):
            while queue:
                first = queue[0]
                if first.handed_out_bytes < first.n_bytes:
                    return first
                queue.popleft()
        return None
