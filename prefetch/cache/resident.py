"""Everything fits: an expert is loaded when first selected and never leaves.

The ceiling of every comparison of policies: only first touches miss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from prefetch.cache.base import CachePolicy
from prefetch.errors import CapacityError
from prefetch.geometry import ExpertKey


class Resident(CachePolicy):
    """A set that only grows. Its capacity must be the number of all experts.

    Raises:
        CapacityError: an expert is inserted into a full cache.
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._members: dict[ExpertKey, None] = {}  # a dict keeps the order of admission, a set would not

    def access(self, key: ExpertKey) -> None:
        """Nothing to remember: nothing ever has to leave."""

    def insert(self, key: ExpertKey, in_use: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        if len(self._members) >= self.capacity:
            raise CapacityError(
                f"cache=resident keeps every expert, but all {self.capacity} of its slots are taken and {key} is needed: "
                "give it a slot for each expert (cache.slots=1.0) or choose a policy that evicts, such as cache=slru"
            )
        self._members[key] = None
        return []

    def remove(self, key: ExpertKey) -> None:
        del self._members[key]

    def __contains__(self, key: object) -> bool:
        return key in self._members

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self._members)
