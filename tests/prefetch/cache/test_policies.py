"""The contract of `CachePolicy`, for every policy in conf/cache and for its per-layer composition."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import pytest
from hydra.utils import instantiate
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from omegaconf import OmegaConf

from experiments.config import CACHE_COMMON
from prefetch.cache.base import CachePolicy
from prefetch.cache.belady import belady_hits
from prefetch.cache.per_layer import PerLayer
from prefetch.cache.replay import replay_hits
from prefetch.cache.resident import Resident
from prefetch.geometry import ExpertKey

CONFIGS = sorted((Path(__file__).parents[3] / "conf/cache").glob("*.yaml"))
N_LAYERS, N_EXPERTS = 3, 5
ALL_KEYS = [ExpertKey(layer, expert) for layer in range(N_LAYERS) for expert in range(N_EXPERTS)]
Factory = Callable[[int], CachePolicy]


def roomy(factory: Factory, capacity: int) -> CachePolicy:
    """A policy of `capacity`, or of all experts where it promises never to evict."""
    if isinstance(factory(len(ALL_KEYS)), Resident):
        return factory(len(ALL_KEYS))
    return factory(capacity)


def split(factory: Factory, capacity: int) -> CachePolicy:
    """The same policy once per layer, each with `capacity` slots."""
    return PerLayer(capacity * N_LAYERS, N_LAYERS, partial(roomy, factory))


def cases() -> dict[str, Factory]:
    makes: dict[str, Factory] = {}
    for config in CONFIGS:
        own = OmegaConf.load(config)
        factory = instantiate(OmegaConf.masked_copy(own, [key for key in own if key not in ("defaults", *CACHE_COMMON)]))
        makes[config.stem] = partial(roomy, factory)
        makes[f"{config.stem}-per_layer"] = partial(split, factory)
    return makes


every_policy = pytest.mark.parametrize("make", cases().values(), ids=cases().keys())


def random_events(seed: int, n_events: int) -> list[list[ExpertKey]]:
    """Skewed routing: low expert numbers are popular, layers take turns."""
    draw = random.Random(seed)
    events = []
    for index in range(n_events):
        experts = {min(int(draw.expovariate(0.6)), N_EXPERTS - 1) for _ in range(draw.randint(1, 4))}
        events.append([ExpertKey(index % N_LAYERS, expert) for expert in sorted(experts, key=lambda _: draw.random())])
    return events


class PolicyMachine(RuleBasedStateMachine):
    """Routes, prefetches and removes at will, and keeps its own set of members from what the policy returns."""

    make: Factory

    @initialize(capacity=st.integers(3, 7))
    def begin(self, capacity: int) -> None:
        self.policy = self.make(capacity)
        self.members: set[ExpertKey] = set()

    @rule(layer=st.integers(0, N_LAYERS - 1), experts=st.lists(st.integers(0, N_EXPERTS - 1), min_size=1, unique=True))
    def route(self, layer: int, experts: list[int]) -> None:
        event = [ExpertKey(layer, expert) for expert in experts]
        hits = [key for key in event if key in self.policy]
        for key in hits:
            self.policy.access(key)
        for key in event:
            if key not in hits:
                self.admit(key, self.policy.insert(key, frozenset(event)), event)
        assert set(hits) <= self.members

    @precondition(lambda self: self.policy.admits_prefetch)
    @rule(key=st.sampled_from(ALL_KEYS), in_use=st.sets(st.sampled_from(ALL_KEYS)))
    def prefetch(self, key: ExpertKey, in_use: set[ExpertKey]) -> None:
        assume(key not in self.policy)
        self.admit(key, self.policy.insert_prefetched(key, in_use), in_use)

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.members)))
        self.policy.remove(key)
        self.members.remove(key)

    def admit(self, key: ExpertKey, victims: list[ExpertKey], in_use: Collection[ExpertKey]) -> None:
        assert len(set(victims)) == len(victims)
        assert set(victims) <= self.members | {key}
        assert not set(victims) & (set(in_use) - {key})
        self.members = (self.members | {key}) - set(victims)

    @invariant()
    def books_agree(self) -> None:
        listed = list(self.policy)
        assert len(listed) == len(self.policy) == len(self.members) <= self.policy.capacity
        assert set(listed) == self.members
        assert {key for key in ALL_KEYS if key in self.policy} == self.members


@every_policy
def test_contract(make: Factory) -> None:
    machine = type("Machine", (PolicyMachine,), {"make": staticmethod(make)})
    run_state_machine_as_test(machine, settings=settings(max_examples=30, stateful_step_count=40, deadline=None))


@every_policy
def test_the_same_calls_give_the_same_victims(make: Factory) -> None:
    def victims(policy: CachePolicy) -> list[list[ExpertKey]]:
        returned: list[list[ExpertKey]] = []
        for event in random_events(seed=1, n_events=200):
            members = [key for key in event if key in policy]
            for key in members:
                policy.access(key)
            returned.extend(policy.insert(key, event) for key in event if key not in members)
        return returned

    assert victims(make(4)) == victims(make(4))


@every_policy
@pytest.mark.parametrize("capacity", [3, 5, 7])
def test_no_policy_beats_the_bound(make: Factory, capacity: int) -> None:
    for seed in range(5):
        events = random_events(seed, n_events=300)
        policy = make(capacity)
        counts = replay_hits(policy, events)
        assert counts.hits <= belady_hits(events, max(1, policy.capacity)).hits
        assert counts.hits + counts.misses == sum(len(event) for event in events)


def test_every_policy_of_the_issue_has_a_config() -> None:
    assert {"slru", "slru_promote", "slru_reserved", "lru", "lfu", "none", "resident"} <= {config.stem for config in CONFIGS}
