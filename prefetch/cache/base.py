"""What a cache policy is: bookkeeping over expert keys. No tensors, no clock, no threads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator

from prefetch.geometry import ExpertKey


class CachePolicy(ABC):
    """Decides which experts stay in the fast tier.

    The caller replays one *routing event* at a time (all experts one layer call needs): first `access` for every
    member, in routing order, then `insert` for every non-member, in routing order, each with the whole event as
    `in_use`, so that nothing the event needs is evicted by it.
    """

    admits_prefetch = False  # True: an unconfirmed prefetch may become a member (and evict) through `insert_prefetched`

    def __init__(self, capacity: int):
        self.capacity = capacity  # experts that can be members at once

    @abstractmethod
    def access(self, key: ExpertKey) -> None:
        """The router selected `key`, which is a member."""

    @abstractmethod
    def insert(self, key: ExpertKey, in_use: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        """The router selected `key`, which is not a member: admit it.

        Returns the keys that leave. It holds `key` itself when nothing else may leave (every candidate is pinned or
        `in_use`) or when the policy declines it: the expert is then used once and not kept.
        """

    def insert_prefetched(self, key: ExpertKey, in_use: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        """Admit a prefetched `key` that no router has confirmed yet; same result as `insert`.

        Only called where `admits_prefetch`; by default a prefetch waits in a staging slot and never evicts.
        """
        raise TypeError(f"{type(self).__name__} does not admit unconfirmed prefetches")

    @abstractmethod
    def remove(self, key: ExpertKey) -> None:
        """Drop a member (its transfer failed, or the caller needs the slot)."""

    @abstractmethod
    def __contains__(self, key: object) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[ExpertKey]: ...
