"""Keeping nothing: every activation misses."""

from __future__ import annotations

import pytest

from prefetch.cache.none import NoCache
from prefetch.cache.replay import replay_hits
from prefetch.geometry import ExpertKey


def test_every_activation_misses_and_no_slot_is_taken() -> None:
    event = [ExpertKey(0, 1), ExpertKey(0, 2)]
    cache = NoCache(100)
    counts = replay_hits(cache, [event] * 5)
    assert (counts.hits, counts.misses, len(cache), cache.capacity) == (0, 10, 0, 0)


def test_it_has_no_member_to_access_or_remove() -> None:
    cache = NoCache(1)
    assert cache.insert(ExpertKey(0, 0)) == [ExpertKey(0, 0)]
    with pytest.raises(KeyError):
        cache.access(ExpertKey(0, 0))
    with pytest.raises(KeyError):
        cache.remove(ExpertKey(0, 0))
