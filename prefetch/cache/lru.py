"""Least recently used: the expert that no router has asked for the longest leaves first.

The cache of most offloading engines, per layer in Eliseev & Mazur 2023 (arXiv 2312.17238), global in others; it bets
that a token uses what its neighbours used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator

from prefetch.cache.base import CachePolicy
from prefetch.errors import CapacityError
from prefetch.geometry import ExpertKey


class Lru(CachePolicy):
    """One recency list. Iterates from the least to the most recently used, which is the order of eviction."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise CapacityError(f"lru needs at least 1 slot, got {capacity}")
        super().__init__(capacity)
        self._members: OrderedDict[ExpertKey, None] = OrderedDict()

    def access(self, key: ExpertKey) -> None:
        self._members.move_to_end(key)

    def insert(self, key: ExpertKey, in_use: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        victims = []
        if len(self._members) >= self.capacity:
            victim = next((member for member in self._members if member not in in_use), key)
            if victim == key:
                return [key]
            del self._members[victim]
            victims.append(victim)
        self._members[key] = None
        return victims

    def remove(self, key: ExpertKey) -> None:
        del self._members[key]

    def __contains__(self, key: object) -> bool:
        return key in self._members

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self._members)
