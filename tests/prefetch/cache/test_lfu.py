"""LFU against cachetools, which breaks ties by recency too, and what `in_use` adds to it."""

from __future__ import annotations

import random

import cachetools
import pytest

from prefetch.cache.lfu import Lfu
from prefetch.errors import CapacityError
from prefetch.geometry import ExpertKey

A, B, C, D = (ExpertKey(0, expert) for expert in range(4))


@pytest.mark.parametrize("capacity", [1, 2, 7, 20])
def test_equals_cachetools_one_access_at_a_time(capacity: int) -> None:
    draw = random.Random(capacity)
    ours = Lfu(capacity)
    theirs: cachetools.LFUCache[ExpertKey, None] = cachetools.LFUCache(capacity)
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


def test_a_count_dies_with_its_member() -> None:
    cache = Lfu(2)
    cache.insert(A)
    for _ in range(5):
        cache.access(A)
    cache.remove(A)
    cache.insert(A)
    cache.insert(B)
    assert cache.insert(C) == [A]


def test_what_the_event_needs_stays() -> None:
    cache = Lfu(2)
    cache.insert(A)
    cache.insert(B)
    cache.access(B)
    assert cache.insert(C, in_use=[A, C]) == [B]
    assert cache.insert(D, in_use=[A, C, D]) == [D]
    assert set(cache) == {A, C}


def test_no_slot_is_an_error() -> None:
    with pytest.raises(CapacityError, match="lfu needs at least 1 slot, got 0"):
        Lfu(0)
