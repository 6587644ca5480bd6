"""What moving experts means: transfers of one expert row into one slot, demand before prefetch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum

from prefetch.errors import TransferError
from prefetch.geometry import ExpertKey


class TransferState(Enum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


SETTLED = frozenset({TransferState.DONE, TransferState.FAILED, TransferState.CANCELLED})


class Transfer(ABC):
    """One expert on its way into one slot. Times are `time.perf_counter()` seconds, 0.0 while they are not known.

    Attributes:
        slot: where it goes.
        n_bytes: what a complete transfer moves.
    """

    key: ExpertKey
    slot: int
    n_bytes: int

    @property
    @abstractmethod
    def state(self) -> TransferState: ...

    @property
    @abstractmethod
    def demand(self) -> bool:
        """False: a prefetch, as long as it has not been promoted."""

    @property
    @abstractmethod
    def moved_bytes(self) -> int:
        """So far; less than `n_bytes` if cancelled or failed on the way."""

    @property
    @abstractmethod
    def submitted_s(self) -> float: ...

    @property
    @abstractmethod
    def started_s(self) -> float: ...

    @property
    @abstractmethod
    def finished_s(self) -> float: ...

    @property
    @abstractmethod
    def error(self) -> TransferError | None:
        """Why it failed; None if it did not."""

    @property
    def settled(self) -> bool:
        """No more bytes will be written into the slot."""
        return self.state in SETTLED


class Transfers(ABC):
    """Moves experts from the backing tier into slots, in the background.

    Rules: queued demand loads go before queued prefetches, each in order of submission, and no prefetch begins while a demand
    load moves; large transfers move in chunks, so that a demand load waits for one chunk at most; errors are kept in the transfer and surface at the layer that needs it.
    """

    @abstractmethod
    def submit(self, key: ExpertKey, slot: int, *, demand: bool) -> Transfer:
        """Start moving `key` into `slot`; returns at once."""

    @abstractmethod
    def promote(self, transfer: Transfer) -> None:
        """The router confirmed a prefetch: its remaining chunks now go with the demand loads."""

    @abstractmethod
    def cancel(self, transfer: Transfer) -> None:
        """Stop a transfer: at once if queued, after the chunk under way if running. A settled one stays as it is."""

    @abstractmethod
    def wait_any(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        """Block until at least one of `transfers` has settled; returns all of them that have, in the order given.

        The waiting thread may itself move queued demand chunks when nobody else is free to.
        """

    @property
    @abstractmethod
    def queued_bytes(self) -> int:
        """Bytes submitted and not yet moved: what a new transfer of equal priority would wait behind."""

    @abstractmethod
    def close(self) -> None:
        """Cancel everything and stop all threads. Safe to call twice."""
