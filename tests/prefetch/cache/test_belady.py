"""The Belady bound against exhaustive search over every possible content of the cache."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.cache.belady import belady_hits
from prefetch.cache.lru import Lru
from prefetch.cache.replay import replay_hits
from prefetch.errors import CapacityError
from prefetch.geometry import ExpertKey

A, B, C, D = (ExpertKey(0, expert) for expert in range(4))

keys = st.builds(ExpertKey, st.integers(0, 1), st.integers(0, 2))
traces = st.lists(st.lists(keys, min_size=1, max_size=4, unique=True), max_size=7)


def most_hits(events: list[list[ExpertKey]], capacity: int, keep_hits: bool, start: frozenset[ExpertKey] = frozenset()) -> int:
    """Exhaustive search. After an event any choice of what is there may stay; with `keep_hits`, the event's hits must."""
    best = {start: 0}
    for event in events:
        after: dict[frozenset[ExpertKey], int] = {}
        for content, hits in best.items():
            event_hits = content & frozenset(event)
            present = content | frozenset(event)
            for size in range(min(capacity, len(present)) + 1):
                for kept in map(frozenset, combinations(sorted(present), size)):
                    if not keep_hits or event_hits <= kept:
                        after[kept] = max(after.get(kept, 0), hits + len(event_hits))
        best = after
    return max(best.values())


@settings(max_examples=150, deadline=None)
@given(traces, st.integers(1, 4))
def test_equals_exhaustive_search(events: list[list[ExpertKey]], capacity: int) -> None:
    counts = belady_hits(events, capacity)
    assert counts.hits == most_hits(events, capacity, keep_hits=False)
    assert counts.hits + counts.misses == sum(len(event) for event in events)
    assert counts.hits >= most_hits(events, capacity, keep_hits=True)


@settings(max_examples=100, deadline=None)
@given(traces, st.integers(1, 4), st.sets(keys, max_size=4))
def test_equals_exhaustive_search_from_a_warm_start(
    events: list[list[ExpertKey]], capacity: int, preloaded: set[ExpertKey]
) -> None:
    start = frozenset(sorted(preloaded)[:capacity])
    counts = belady_hits(events, capacity, preloaded=start)
    assert counts.hits == most_hits(events, capacity, keep_hits=False, start=start)


def test_bypass_beats_textbook_eviction() -> None:
    """With one slot, A A B A A: admitting B would cost a hit."""
    assert belady_hits([[A], [A], [B], [A], [A]], 1).hits == 3


def test_the_whole_event_counts_before_anything_leaves() -> None:
    """LRU on a cycle larger than the cache never hits; the bound keeps two of the four."""
    events = [[A, B], [C, D]] * 10
    assert replay_hits(Lru(2), events).hits == 0
    assert belady_hits(events, 2).hits == 18


def test_hits_are_counted_per_layer() -> None:
    other = ExpertKey(2, 0)
    counts = belady_hits([[A, B], [other], [A, B], [other]], 3)
    assert counts.hits_per_layer.tolist() == [2, 0, 1]
    assert counts.misses_per_layer.tolist() == [2, 0, 1]


def test_no_slot_is_an_error() -> None:
    with pytest.raises(CapacityError, match="at least 1 slot"):
        belady_hits([[A]], 0)
