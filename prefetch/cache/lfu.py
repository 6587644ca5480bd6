"""Least frequently used: the expert with the fewest selections since it was admitted leaves first.

Classical in-cache LFU, the policy that 2511.05814 finds ahead of LRU for Mixtral: a count dies with its member, and among
equal counts the least recently used leaves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator

from prefetch.cache.base import CachePolicy
from prefetch.errors import CapacityError
from prefetch.geometry import ExpertKey


class Lfu(CachePolicy):
    """One recency list per count, so that the next victim is the head of the lowest one."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise CapacityError(f"lfu needs at least 1 slot, got {capacity}")
        super().__init__(capacity)
        self._count: dict[ExpertKey, int] = {}
        self._with_count: dict[int, OrderedDict[ExpertKey, None]] = {}  # least recently used first

    def access(self, key: ExpertKey) -> None:
        count = self._count[key] + 1
        self.remove(key)
        self._add(key, count)

    def insert(self, key: ExpertKey, in_use: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        victims = []
        if len(self._count) >= self.capacity:
            victim = next((member for member in self if member not in in_use), key)
            if victim == key:
                return [key]
            self.remove(victim)
            victims.append(victim)
        self._add(key, 1)
        return victims

    def remove(self, key: ExpertKey) -> None:
        count = self._count.pop(key)
        members = self._with_count[count]
        del members[key]
        if not members:
            del self._with_count[count]

    def _add(self, key: ExpertKey, count: int) -> None:
        self._count[key] = count
        self._with_count.setdefault(count, OrderedDict())[key] = None

    def __contains__(self, key: object) -> bool:
        return key in self._count

    def __len__(self) -> int:
        return len(self._count)

    def __iter__(self) -> Iterator[ExpertKey]:
        """In the order of eviction."""
        for count in sorted(self._with_count):
            yield from self._with_count[count]
