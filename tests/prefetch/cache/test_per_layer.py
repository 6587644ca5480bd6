"""The per-layer composition: shares, isolation of layers, errors."""

from __future__ import annotations

import random
from functools import partial

import pytest

from prefetch.cache.lru import Lru
from prefetch.cache.none import NoCache
from prefetch.cache.per_layer import PerLayer
from prefetch.cache.replay import replay_hits
from prefetch.cache.slru import Slru
from prefetch.errors import CapacityError
from prefetch.geometry import ExpertKey


def test_left_over_slots_go_to_the_first_layers() -> None:
    cache = PerLayer(11, 3, Lru)
    assert [policy.capacity for policy in cache.layers] == [4, 4, 3]
    assert cache.capacity == 11


def test_capacity_is_what_the_policies_take() -> None:
    assert PerLayer(11, 3, NoCache).capacity == 0


def test_equals_a_separate_cache_for_each_layer() -> None:
    draw = random.Random(0)
    events = [[ExpertKey(index % 3, expert) for expert in draw.sample(range(9), 3)] for index in range(600)]
    counts = replay_hits(PerLayer(15, 3, Lru), events)
    for layer in range(3):
        alone = replay_hits(Lru(5), [event for event in events if event[0].layer == layer])
        assert counts.hits_per_layer[layer] == alone.hits > 0
        assert counts.misses_per_layer[layer] == alone.misses


def test_a_busy_layer_cannot_crowd_out_another() -> None:
    quiet = ExpertKey(1, 0)
    cache = PerLayer(4, 2, Lru)
    cache.insert(quiet)
    victims = [cache.insert(ExpertKey(0, expert)) for expert in range(10)]
    assert quiet in cache
    assert all(victim.layer == 0 for returned in victims for victim in returned)


def test_prefetches_reach_the_layer_s_policy() -> None:
    cache = PerLayer(16, 2, partial(Slru, variant="promote_on_prefetch"))
    assert cache.admits_prefetch
    assert cache.insert_prefetched(ExpertKey(1, 3)) == []
    assert ExpertKey(1, 3) in cache.layers[1] and len(cache.layers[0]) == 0
    assert not PerLayer(16, 2, Lru).admits_prefetch
    with pytest.raises(TypeError, match="Lru does not admit unconfirmed prefetches"):
        PerLayer(16, 2, Lru).insert_prefetched(ExpertKey(0, 0))


def test_a_layer_without_a_slot_is_an_error() -> None:
    with pytest.raises(CapacityError, match=r"2 slots cannot be split over 3 MoE layers: cache.slots must be at least 3"):
        PerLayer(2, 3, Lru)


def test_a_share_too_small_for_the_policy_is_an_error_that_says_so() -> None:
    with pytest.raises(CapacityError, match=r"5 slots over 3 MoE layers leave 1 for one: slru \(original\) needs"):
        PerLayer(5, 3, Slru)
