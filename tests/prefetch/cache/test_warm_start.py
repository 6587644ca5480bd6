"""Warm start against what each policy promises: it fills the cache, with the hottest, and nothing else."""

from __future__ import annotations

import random

import pytest

from prefetch.cache.lfu import Lfu
from prefetch.cache.lru import Lru
from prefetch.cache.none import NoCache
from prefetch.cache.per_layer import PerLayer
from prefetch.cache.slru import Slru
from prefetch.cache.warm_start import warm_start
from prefetch.geometry import ExpertKey
from tests.prefetch.cache.test_policies import ALL_KEYS, N_LAYERS, Factory, every_policy

HOTTEST_FIRST = random.Random(0).sample(ALL_KEYS, len(ALL_KEYS))
COLD = ExpertKey(0, 99)


@every_policy
@pytest.mark.parametrize("capacity", [3, 4, 7])
def test_members_are_reported_hottest_first(make: Factory, capacity: int) -> None:
    policy = make(capacity)
    members = warm_start(policy, HOTTEST_FIRST)
    assert set(members) == set(policy) and len(members) == len(policy) <= policy.capacity
    assert members == [key for key in HOTTEST_FIRST if key in members]


@pytest.mark.parametrize("policy_class", [Lru, Lfu, Slru])
@pytest.mark.parametrize("capacity", [2, 5, len(ALL_KEYS)])
def test_the_hottest_fill_the_cache(policy_class: type[Lru], capacity: int) -> None:
    assert warm_start(policy_class(capacity), HOTTEST_FIRST) == HOTTEST_FIRST[:capacity]


def test_each_layer_takes_its_own_hottest() -> None:
    policy = PerLayer(3 * N_LAYERS, N_LAYERS, Slru)
    members = warm_start(policy, HOTTEST_FIRST)
    for layer in range(N_LAYERS):
        of_layer = [key for key in HOTTEST_FIRST if key.layer == layer]
        assert [key for key in members if key.layer == layer] == of_layer[:3]


@pytest.mark.parametrize("policy_class", [Lru, Lfu, Slru])
def test_the_first_to_leave_is_the_coldest(policy_class: type[Lru]) -> None:
    policy = policy_class(5)
    members = warm_start(policy, HOTTEST_FIRST)
    assert policy.insert(COLD) == [members[-1]]


def test_a_segmented_cache_protects_the_hottest() -> None:
    policy = Slru(8)
    warm_start(policy, HOTTEST_FIRST)
    assert set(policy.protected) == set(HOTTEST_FIRST[:6]) and set(policy.probation) == set(HOTTEST_FIRST[6:8])


def test_a_cache_that_keeps_nothing_stays_empty() -> None:
    policy = NoCache(0)
    assert warm_start(policy, HOTTEST_FIRST) == [] and len(policy) == 0
