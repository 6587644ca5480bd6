"""Segmented LRU: the original's rules step by step, its pins, its two weaknesses, and the variants that answer them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import cachetools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.cache.lru import Lru
from prefetch.cache.replay import replay_hits
from prefetch.cache.slru import VARIANTS, Slru
from prefetch.errors import CapacityError, ConfigError
from prefetch.geometry import ExpertKey

KEYS = [ExpertKey(layer, expert) for layer in range(3) for expert in range(32)]
some_keys = st.sampled_from(KEYS[:14])


class TwoLists:
    """The original's rules written down once more, most recent first, as plainly as possible."""

    def __init__(self, capacity: int, victim: str, fill: bool):
        self.capacity, self.fill = capacity, fill
        self.probation_capacity = max(1, capacity // 4)
        self.protected_capacity = max(1, capacity - self.probation_capacity)
        self.probation: list[ExpertKey] = []
        self.protected: list[ExpertKey] = []
        self.selected: Counter[ExpertKey] = Counter()
        self.victim = victim

    def access(self, key: ExpertKey) -> None:
        self.selected[key] += 1
        if key in self.protected:
            self.protected.remove(key)
        else:
            self.probation.remove(key)
            if len(self.protected) == self.protected_capacity:
                self.probation.insert(0, self.protected.pop())
        self.protected.insert(0, key)

    def insert(self, key: ExpertKey, in_use: Collection[ExpertKey], is_prefetch: bool) -> list[ExpertKey]:
        self.selected[key] += not is_prefetch
        self.probation.insert(0, key)
        n_members = len(self.probation) + len(self.protected)
        if n_members <= self.capacity if self.fill else len(self.probation) <= self.probation_capacity:
            return []
        candidates = [other for other in reversed(self.probation) if other != key and other not in in_use]
        if not candidates:
            candidates = [key]
        elif self.victim == "least_accessed":
            fewest = min(self.selected[other] for other in candidates)
            candidates = [other for other in candidates if self.selected[other] == fewest]
        self.probation.remove(candidates[0])
        return [candidates[0]]


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("victim", ["tail", "least_accessed"])
@settings(max_examples=150, deadline=None)
@given(
    capacity=st.integers(2, 13),
    steps=st.lists(st.tuples(some_keys, st.booleans(), st.sets(some_keys, max_size=4)), max_size=120),
)
def test_original_equals_two_plain_lists(
    victim: str, fill: bool, capacity: int, steps: list[tuple[ExpertKey, bool, set[ExpertKey]]]
) -> None:
    cache, model = Slru(capacity, victim=victim, fill=fill), TwoLists(capacity, victim, fill)
    for key, is_prefetch, in_use in steps:
        if key in cache:
            cache.access(key)
            model.access(key)
        else:
            insert = cache.insert_prefetched if is_prefetch else cache.insert
            assert insert(key, in_use) == model.insert(key, in_use, is_prefetch)
        assert list(cache.probation) == model.probation[::-1]
        assert list(cache.protected) == model.protected[::-1]


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(3, 9),
    calls=st.lists(st.tuples(st.sampled_from(["route", "prefetch", "pin", "unpin", "remove"]), some_keys), max_size=120),
)
def test_pinned_members_never_leave(variant: str, fill: bool, capacity: int, calls: list[tuple[str, ExpertKey]]) -> None:
    cache, pinned = Slru(capacity, variant=variant, fill=fill), set()
    for call, key in calls:
        victims: list[ExpertKey] = []
        if call == "pin":
            cache.pin(key)
            pinned |= {key} & set(cache)
        elif call == "unpin":
            cache.unpin(key)
            pinned.discard(key)
        elif key not in cache:
            victims = cache.insert_prefetched(key) if call == "prefetch" else cache.insert(key)
        elif call == "route":
            cache.access(key)
        elif call == "remove":
            cache.remove(key)
            pinned.discard(key)
        assert not pinned & set(victims)
        assert pinned <= set(cache.protected)
        assert len(cache) == len(set(cache)) <= capacity


def test_a_quarter_is_probation() -> None:
    sizes = {capacity: (Slru(capacity).probation_capacity, Slru(capacity).protected_capacity) for capacity in (2, 3, 4, 8, 103)}
    assert sizes == {2: (1, 1), 3: (1, 2), 4: (1, 3), 8: (2, 6), 103: (25, 78)}


def test_pinning_what_is_not_resident_does_nothing() -> None:
    cache = Slru(8)
    cache.pin(KEYS[0])
    assert len(cache) == 0
    cache.insert(KEYS[0])
    assert list(cache.probation) == [KEYS[0]] and not cache.protected


def test_pins_may_take_every_slot_and_give_them_back() -> None:
    cache = Slru(4)
    for key in KEYS[:4]:
        cache.insert(key)
        cache.pin(key)
    assert list(cache.protected) == KEYS[:4]
    assert cache.insert(KEYS[4]) == [KEYS[4]]
    cache.unpin(KEYS[2])
    assert cache.insert(KEYS[4]) == [KEYS[2]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_declined_prefetch_changes_nothing(variant: str) -> None:
    cache = Slru(8, variant=variant)
    for key in KEYS[:8]:
        cache.insert_prefetched(key)
    before = [list(cache.probation), list(cache.protected), list(cache.waiting)]
    assert cache.insert_prefetched(KEYS[20], in_use=set(cache)) == [KEYS[20]]
    assert [list(cache.probation), list(cache.protected), list(cache.waiting)] == before


def test_cold_original_holds_a_quarter_until_second_touches() -> None:
    cache = Slru(16)
    for key in KEYS:
        cache.insert(key)
    assert len(cache) == 4
    for key in list(cache):
        cache.access(key)
    for key in KEYS[:20]:
        cache.insert(key)
    assert len(cache) == 8  # each second touch made room for one more


def test_original_never_warms_up_where_a_token_needs_more_than_probation() -> None:
    """All 12 experts of a token fit, yet each leaves probation (4) before the next token touches it again."""
    token = [KEYS[32 * layer : 32 * layer + 4] for layer in range(3)]
    assert replay_hits(Slru(16), token * 50).hits == 0
    assert replay_hits(Lru(16), token * 50).misses == 12


def test_filled_probation_lives_to_see_the_second_use() -> None:
    token = [KEYS[32 * layer : 32 * layer + 4] for layer in range(3)]
    assert replay_hits(Slru(16, fill=True), token * 50).misses == 12


def test_fill_is_first_in_first_out_while_nothing_is_used_twice() -> None:
    cache, theirs = Slru(16, fill=True), cachetools.FIFOCache[ExpertKey, None](16)
    for key in KEYS:
        cache.insert(key)
        theirs[key] = None
        assert set(cache) == set(theirs)


def test_probation_gives_back_what_it_borrowed_as_protected_grows() -> None:
    cache = Slru(8, fill=True)
    for key in KEYS[:8]:
        cache.insert(key)
    for key in KEYS[:7]:
        cache.access(key)
    assert (list(cache.probation), list(cache.protected)) == ([KEYS[7], KEYS[0]], KEYS[1:7])


def test_a_prefetch_promoted_into_a_full_cache_takes_what_probation_borrowed() -> None:
    cache = Slru(8, variant="promote_on_prefetch", fill=True)
    for key in KEYS[:8]:
        cache.insert(key)
    assert cache.insert_prefetched(KEYS[8]) == [KEYS[0]]
    assert (list(cache.probation), list(cache.protected)) == (KEYS[1:8], [KEYS[8]])


def test_cold_promote_on_prefetch_fills_protected_at_once() -> None:
    cache = Slru(16, variant="promote_on_prefetch")
    assert [cache.insert_prefetched(key) for key in KEYS[:12]] == [[]] * 12
    assert list(cache.protected) == KEYS[:12]


def burst(cache: Slru, n: int) -> list[ExpertKey]:
    """`n` prefetches, none of them used; returns those still there."""
    for key in KEYS[:n]:
        cache.insert_prefetched(key)
    return [key for key in KEYS[:n] if key in cache]


def test_a_burst_of_prefetches_flushes_its_own_beginning_in_the_original() -> None:
    assert burst(Slru(16), 10) == KEYS[6:10]


def test_a_burst_of_prefetches_flushes_confirmed_probation_in_the_original() -> None:
    cache = Slru(16)
    for key in KEYS[40:44]:
        cache.insert(key)
    burst(cache, 4)
    assert not set(KEYS[40:44]) & set(cache)


def test_least_accessed_prefers_prefetches_that_wait_for_their_first_use() -> None:
    cache = Slru(8, victim="least_accessed")
    cache.insert(KEYS[40])
    cache.insert_prefetched(KEYS[0])
    assert cache.insert(KEYS[41]) == [KEYS[0]]


def test_promote_on_prefetch_keeps_a_burst() -> None:
    assert burst(Slru(16, variant="promote_on_prefetch"), 10) == KEYS[:10]


def test_promote_on_prefetch_sends_back_the_oldest_when_protected_is_full() -> None:
    cache = Slru(8, variant="promote_on_prefetch")
    assert burst(cache, 8) == KEYS[:8]
    assert (list(cache.probation), list(cache.protected)) == (KEYS[:2], KEYS[2:8])
    assert cache.insert_prefetched(KEYS[8]) == [KEYS[0]]


def test_reserved_keeps_the_beginning_of_a_burst_and_all_that_is_confirmed() -> None:
    cache = Slru(16, variant="reserved", reserved=4)
    for key in KEYS[40:44]:
        cache.insert(key)
    confirmed = [list(cache.probation), list(cache.protected)]
    assert burst(cache, 10) == KEYS[:4]
    assert [list(cache.probation), list(cache.protected)] == confirmed


def test_reserved_prefetch_enters_probation_when_the_router_selects_it() -> None:
    cache = Slru(16, variant="reserved", reserved=4)
    cache.insert_prefetched(KEYS[0])
    cache.access(KEYS[0])
    assert (list(cache.probation), list(cache.waiting)) == ([KEYS[0]], [])
    cache.access(KEYS[0])
    assert list(cache.protected) == [KEYS[0]]


def test_reserved_prefetch_gives_way_once_its_layer_has_passed_it_over() -> None:
    cache = Slru(8, variant="reserved", reserved=2)
    cache.insert_prefetched(ExpertKey(1, 0))
    cache.insert_prefetched(ExpertKey(2, 0))
    cache.insert(ExpertKey(0, 9))
    assert cache.insert_prefetched(ExpertKey(1, 1)) == [ExpertKey(1, 1)]  # neither layer has routed yet
    cache.insert(ExpertKey(2, 9))
    assert cache.insert_prefetched(ExpertKey(1, 1), in_use=[ExpertKey(2, 0)]) == [ExpertKey(1, 1)]
    assert cache.insert_prefetched(ExpertKey(1, 1)) == [ExpertKey(2, 0)]
    assert list(cache.waiting) == [ExpertKey(1, 0), ExpertKey(1, 1)]


def test_expire_after_counts_the_selections_of_the_prefetch_s_own_layer() -> None:
    cache = Slru(8, variant="reserved", reserved=1, expire_after=3)
    cache.insert_prefetched(ExpertKey(1, 0))
    cache.insert(ExpertKey(1, 7))
    cache.access(ExpertKey(1, 7))
    for expert in range(9):
        cache.insert(ExpertKey(0, expert))
    assert cache.insert_prefetched(ExpertKey(1, 1)) == [ExpertKey(1, 1)]  # layer 1 has made 2 selections
    cache.access(ExpertKey(1, 7))
    assert cache.insert_prefetched(ExpertKey(1, 1)) == [ExpertKey(1, 0)]


def test_confirmed_prefetches_make_room_at_the_next_insertion() -> None:
    cache = Slru(8, variant="reserved", reserved=4)  # probation 1, protected 3
    for key in KEYS[:4]:
        cache.insert_prefetched(key)
    for key in KEYS[:4]:
        cache.access(key)
    assert (list(cache.probation), list(cache.waiting)) == (KEYS[:4], [])
    assert cache.insert_prefetched(KEYS[4], in_use=KEYS[:4]) == []  # 4 slots are free: nothing in use has to leave
    assert cache.insert_prefetched(KEYS[5]) == KEYS[:3]
    assert cache.insert(KEYS[6]) == [KEYS[3]]


@pytest.mark.parametrize(("capacity", "reserved", "n_reserved"), [(16, 0.25, 4), (3, 0.25, 1), (16, 5, 5)])
def test_reserved_is_a_count_or_a_fraction(capacity: int, reserved: float, n_reserved: int) -> None:
    assert Slru(capacity, variant="reserved", reserved=reserved).waiting.capacity == n_reserved


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capacity": 1}, CapacityError, r"slru \(original\) needs at least 2 slots"),
        (
            {"capacity": 2, "variant": "reserved"},
            CapacityError,
            r"slru \(reserved\) needs at least 3 slots.*1 reserved",
        ),
        ({"capacity": 8, "variant": "reserved", "reserved": 7}, CapacityError, "got 8, of them 7 reserved"),
        ({"capacity": 8, "variant": "reserved", "reserved": 1.5}, ConfigError, "cache.reserved=1.5 must be a fraction"),
        (
            {"capacity": 8, "variant": "reserved", "reserved": 0},
            ConfigError,
            "cache.reserved=0 must be at least 1 slot",
        ),
        (
            {"capacity": 8, "variant": "orignal"},
            ConfigError,
            "cache.variant=orignal .* original, promote_on_prefetch, reserved",
        ),
        ({"capacity": 8, "victim": "head"}, ConfigError, "cache.victim=head .* tail, least_accessed"),
        ({"capacity": 8, "expire_after": 0}, ConfigError, "cache.expire_after must be at least 1 selection, got 0"),
    ],
)
def test_impossible_options_are_errors(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Slru(**options)  # type: ignore[arg-type]
