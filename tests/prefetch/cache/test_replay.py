"""Replay of recorded routing events: order of calls, counts, protection of the event in progress."""

from __future__ import annotations

import math
from collections.abc import Collection

from prefetch.cache.lru import Lru
from prefetch.cache.replay import replay_hits
from prefetch.geometry import ExpertKey

A, B, C, D = (ExpertKey(0, expert) for expert in range(4))


class LoggingLru(Lru):
    """Writes down how it is called."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self.calls: list[tuple[str, ExpertKey]] = []

    def access(self, key: ExpertKey) -> None:
        self.calls.append(("access", key))
        super().access(key)

    def insert(self, key: ExpertKey, in_use: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        self.calls.append(("insert", key))
        return super().insert(key, in_use)


def test_accesses_come_before_inserts_each_in_routing_order() -> None:
    cache = LoggingLru(4)
    replay_hits(cache, [[A, B]])
    cache.calls.clear()
    replay_hits(cache, [[C, B, D, A]])
    assert cache.calls == [("access", B), ("access", A), ("insert", C), ("insert", D)]


def test_an_event_larger_than_the_cache_keeps_its_first_misses() -> None:
    cache = Lru(2)
    counts = replay_hits(cache, [[A, B, C, D], [A, B, C, D]])
    assert list(cache) == [A, B]
    assert (counts.hits, counts.misses) == (2, 6)


def test_replay_goes_on_from_the_policy_s_present_state() -> None:
    cache = Lru(2)
    assert replay_hits(cache, [[A], [B]]).hits == 0
    assert replay_hits(cache, [[A], [B]]).hits == 2


def test_counts_are_per_layer() -> None:
    deep = ExpertKey(2, 0)
    counts = replay_hits(Lru(3), [[A, B], [deep], [A, C], [deep], [B]])
    assert counts.hits_per_layer.tolist() == [1, 0, 1]
    assert counts.misses_per_layer.tolist() == [4, 0, 1]
    assert counts.hit_rate == 2 / 7


def test_nothing_needed_has_no_hit_rate() -> None:
    counts = replay_hits(Lru(1), [])
    assert (counts.hits, counts.misses) == (0, 0)
    assert math.isnan(counts.hit_rate)
