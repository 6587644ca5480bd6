"""No cache: every activation loads its expert, uses it once and lets it go.

The floor of every comparison of policies: what demand loading costs when nothing is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from prefetch.cache.base import CachePolicy
from prefetch.geometry import ExpertKey


class NoCache(CachePolicy):
    """Declines every expert. Whatever capacity it is offered, it takes 0 of it."""

    def __init__(self, capacity: int = 0):
        super().__init__(0)

    def access(self, key: ExpertKey) -> None:
        raise KeyError(key)

    def insert(self, key: ExpertKey, in_use: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        return [key]

    def remove(self, key: ExpertKey) -> None:
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(())
