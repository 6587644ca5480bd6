"""What moving experts means: transfers of one expert row into one slot, demand before prefetch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from prefetch.geometry import ExpertKey


class TransferState(Enum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


SETTLED = frozenset({TransferState.DONE, TransferState.FAILED, TransferState.CANCELLED})


@dataclass(eq=False)
class Transfer:
    """One expert on its way into one slot. Times are `time.perf_counter()` seconds; the transfers object writes them."""

    key: ExpertKey
    slot: int
    demand: bool  # False: a prefetch (may be promoted)
    n_bytes: int  # what a complete transfer moves
    state: TransferState = TransferState.QUEUED
    moved_bytes: int = 0  # so far; less than n_bytes if cancelled or failed on the way
    submitted_s: float = 0.0
    started_s: float = 0.0
    finished_s: float = 0.0
    error: BaseException | None = None

    @property
    def settled(self) -> bool:
        """No more bytes will be written into the slot."""
        return self.state in SETTLED


class Transfers(ABC):
    """Moves experts from the backing tier into slots, in the background.

    Rules: queued demand loads go before queued prefetches, each in order of submission; large transfers move in chunks, so
    that a demand load waits for one chunk at most; errors are kept in the transfer and surface at the layer that needs it.
    """

    @abstractmethod
    def submit(self, key: ExpertKey, slot: int, *, demand: bool) -> Transfer:
        """Start moving `key` into `slot`; returns at once."""

    @abstractmethod
    def promote(self, transfer: Transfer) -> None:
        """The router confirmed a prefetch: its remaining chunks now go with the demand loads."""

    @abstractmethod
    def cancel(self, transfer: Transfer) -> None:
        """Stop a prefetch: at once if queued, after the chunk under way if running. A settled transfer stays as it is."""

    @abstractmethod
    def wait_any(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        """Block until at least one of `transfers` has settled; returns all of them that have, in the order given.

        The waiting thread may itself move queued demand chunks: a thread hand-over costs more than a small read.
        """

    @property
    @abstractmethod
    def queued_bytes(self) -> int:
        """Bytes submitted and not yet moved: what a new transfer of equal priority would wait behind."""

    @abstractmethod
    def close(self) -> None:
        """Cancel everything, stop all threads, release files. Safe to call twice."""
