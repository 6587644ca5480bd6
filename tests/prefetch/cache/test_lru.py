"""LRU against cachetools, and what `in_use` adds to it."""

from __future__ import annotations

import random

import cachetools
import pytest

from prefetch.cache.lru import Lru
from prefetch.errors import CapacityError
from prefetch.geometry import ExpertKey

A, B, C, D = (ExpertKey(0, expert) for expert in range(4))


@pytest.mark.parametrize("capacity", [1, 2, 7, 20])
def test_equals_cachetools_one_access_at_a_time(capacity: int) -> None:
    draw = random.Random(capacity)
    ours = Lru(capacity)
    theirs: cachetools.LRUCache[ExpertKey, None] = cachetools.LRUCache(capacity)
    for _ in range(3000):
        key = ExpertKey(draw.randrange(2), min(int(draw.expovariate(0.15)), 19))
        assert (key in ours) == (key in theirs)
        if key in ours:
            ours.access(key)
            assert theirs[key] is None  # a look-up is an access
        else:
            before = set(theirs)
            theirs[key] = None
            assert set(ours.insert(key)) == before - set(theirs)
        assert set(ours) == set(theirs)


def test_iterates_in_the_order_of_eviction() -> None:
    cache = Lru(3)
    for key in (A, B, C):
        cache.insert(key)
    cache.access(A)
    assert list(cache) == [B, C, A]
    assert cache.insert(D) == [B]


def test_what_the_event_needs_stays() -> None:
    cache = Lru(2)
    cache.insert(A)
    cache.insert(B)
    assert cache.insert(C, in_use=[A, C]) == [B]
    assert cache.insert(D, in_use=[A, C, D]) == [D]
    assert list(cache) == [A, C]


def test_no_slot_is_an_error() -> None:
    with pytest.raises(CapacityError, match="lru needs at least 1 slot, got 0"):
        Lru(0)
