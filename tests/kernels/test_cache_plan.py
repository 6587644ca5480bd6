"""The cache planner: the kernel against its reference, and both against the host's policies, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cache_plan import cache_plan, cache_plan_reference
from kernels.device_cache import MAX_SLOTS, OLDEST, CachePlan, Counter, DeviceCache, Segment, slru_protected
from prefetch.cache.base import CachePolicy
from prefetch.cache.lru import Lru
from prefetch.cache.slru import Slru
from prefetch.errors import CapacityError, KernelInputError
from prefetch.geometry import ExpertKey

TRACES = Path(__file__).parents[2] / "../shared/traces/gpt-oss-20b"
Plan = Callable[..., CachePlan]
Event = tuple[int, Tensor, Tensor | None]  # layer, ids [T, k], predicted [D, M]


def random_events(
    n_layers: int, n_experts: int, n_tokens: int, top_k: int, predictions: tuple[int, int], n_events: int, seed: int
) -> list[Event]:
    """Layers in turn; a favourite few experts, so that there are hits; some ids are padding or unknown."""
    generator = torch.Generator().manual_seed(seed)
    favour = torch.rand(n_layers, n_experts, generator=generator)
    events: list[Event] = []
    for step in range(n_events):
        layer = step % n_layers
        noise = torch.rand(n_tokens, n_experts, generator=generator)
        ids = (favour[layer] + noise).topk(top_k, dim=1).indices.int()
        ids[torch.rand(ids.shape, generator=generator) < 0.05] = -1
        ids[torch.rand(ids.shape, generator=generator) < 0.02] = n_experts
        predicted = torch.randint(-1, n_experts + 1, predictions, generator=generator).int() if all(predictions) else None
        events.append((layer, ids, predicted))
    return events


def poisoned_plan(ids: Tensor, predicted: Tensor | None) -> CachePlan:
    plan = CachePlan.empty(ids, 0 if predicted is None else predicted.numel())
    for tensor in vars(plan).values():
        tensor.fill_(-99)
    return plan


def tensors(state: DeviceCache | CachePlan) -> dict[str, Tensor]:
    named = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def check_books(cache: DeviceCache, layer: int, ids: Tensor, before: dict[ExpertKey, int]) -> None:
    """What must hold after any plan, whoever made it."""
    segments = [Segment(code) for code in cache.segment.tolist()]
    for slot, (key, segment) in enumerate(zip(cache.key_of.tolist(), segments, strict=True)):
        assert (key < 0) == (segment is Segment.FREE)
        assert key < 0 or int(cache.slot_of.view(-1)[key]) == slot
    assert int((cache.slot_of >= 0).sum()) == int((cache.key_of >= 0).sum())
    assert segments.count(Segment.PROTECTED) <= cache.protected_capacity
    assert segments.count(Segment.PROBATION) + segments.count(Segment.PROTECTED) <= cache.capacity
    assert segments.count(Segment.STAGED) <= cache.staging
    count = cache.counters.tolist()
    transient_prefetches_at_most = count[Counter.TRANSIENTS]
    assert count[Counter.PREFETCHES] == count[Counter.USEFUL] + count[Counter.WASTED] + segments.count(Segment.STAGED)
    assert count[Counter.UNPLACED] + transient_prefetches_at_most <= count[Counter.MISSES] + count[Counter.USEFUL]
    for expert in ids.unique().tolist():  # what this step uses is not evicted
        key = ExpertKey(layer, expert)
        assert key not in before or int(cache.slot_of[key]) == before[key]


def on_board(cache: DeviceCache, *segments: Segment) -> dict[ExpertKey, int]:
    """Key -> slot of what is in any of `segments`."""
    books = zip(cache.key_of.tolist(), cache.segment.tolist(), strict=True)
    return {ExpertKey(*divmod(key, cache.n_experts)): slot for slot, (key, segment) in enumerate(books) if segment in segments}


@st.composite
def drawn_runs(draw: st.DrawFn) -> tuple[DeviceCache, DeviceCache, list[Event]]:
    """Two equal empty caches and a run for them."""
    n_layers, n_experts = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    capacity = draw(st.integers(1, 40))
    sizes = {
        "capacity": capacity,
        "protected_capacity": draw(st.integers(0, capacity - 1)),
        "staging": draw(st.integers(0, 5)),
        "transient": draw(st.integers(0, 4)),
    }
    events = random_events(
        n_layers,
        n_experts,
        n_tokens=draw(st.sampled_from([1, 1, 1, 3])),
        top_k=draw(st.integers(1, min(n_experts, 4))),
        predictions=(draw(st.integers(0, n_layers)), draw(st.integers(0, min(n_experts, 3)))),
        n_events=draw(st.integers(1, 12)),
        seed=draw(st.integers(0, 2**16)),
    )
    return DeviceCache.empty(n_layers, n_experts, **sizes), DeviceCache.empty(n_layers, n_experts, **sizes), events


@given(drawn_runs())
@settings(max_examples=25, deadline=None)
def test_kernel_equals_reference(run: tuple[DeviceCache, DeviceCache, list[Event]]) -> None:
    ours, expected, events = run
    for layer, ids, predicted in events:
        members = on_board(ours, Segment.PROBATION, Segment.PROTECTED, Segment.STAGED)
        plans = poisoned_plan(ids, predicted), poisoned_plan(ids, predicted)
        cache_plan(ours, layer, ids, predicted, plans[0])
        cache_plan_reference(expected, layer, ids, predicted, plans[1])
        for mine, theirs in ((ours, expected), (plans[0], plans[1])):
            want = tensors(theirs)
            assert {name: tensor.tolist() for name, tensor in tensors(mine).items()} == {n: t.tolist() for n, t in want.items()}
        check_books(ours, layer, ids, members)


def test_kernel_equals_reference_where_members_are_older_than_32_bits_tell() -> None:
    caches = [DeviceCache.empty(2, 8, capacity=6, staging=0, transient=2, protected_capacity=4) for _ in range(2)]
    for cache, plan in zip(caches, (cache_plan, cache_plan_reference), strict=True):
        for layer, ids in ((0, [0, 1, 2]), (1, [3, 4, 5]), (0, [0, 1, 2]), (1, [3])):
            plan(cache, layer, torch.tensor([ids]).int())
        cache.since[2:] += OLDEST + 20  # nearly as old as can be told: the next calls take some beyond
        for layer, ids in ((1, [3, 4, 5]), (0, [6, 7]), (1, [0, 1]), (0, [0, 1, 2])):
            plan(cache, layer, torch.tensor([ids]).int())
    assert int(caches[0].since.min()) < OLDEST
    assert [t.tolist() for t in caches[0].tensors] == [t.tolist() for t in caches[1].tensors]


@given(drawn_runs())
@settings(max_examples=60, deadline=None)
def test_copies_bring_what_is_needed_and_predicted(run: tuple[DeviceCache, DeviceCache, list[Event]]) -> None:
    """Play the copies: afterwards every placed expert's bytes (here: its key) are in its slot. Demand loads come first."""
    cache, _, events = run
    contents = [-1] * cache.n_slots
    for layer, ids, predicted in events:
        plan = cache_plan_reference(cache, layer, ids, predicted)
        _, n_demand, n_copies = plan.copy_bounds.tolist()
        keys, slots = plan.copy_keys[:n_copies].tolist(), plan.copy_slots[:n_copies].tolist()
        assert len(set(slots)) == len(set(keys)) == n_copies
        needed = {layer * cache.n_experts + expert for expert in ids.flatten().tolist() if 0 <= expert < cache.n_experts}
        assert needed >= set(keys[:n_demand])
        for key, slot in zip(keys, slots, strict=True):
            contents[slot] = key
        for slot, key in enumerate(cache.key_of.tolist()):
            assert key < 0 or contents[slot] == key
        for expert, slot in zip(ids.flatten().tolist(), plan.slot_ids.flatten().tolist(), strict=True):
            assert slot < 0 or contents[slot] == layer * cache.n_experts + expert
    count = cache.counters.tolist()
    n_needed = sum(len({e for e in ids.flatten().tolist() if 0 <= e < cache.n_experts}) for _, ids, _ in events)
    assert count[Counter.HITS] + count[Counter.USEFUL] + count[Counter.MISSES] == n_needed


def follow(plan: Plan, cache: DeviceCache, policy: CachePolicy, events: Iterable[tuple[int, Tensor]]) -> None:
    """Feed both as the runtime does; after every event they must have the same members in the same segments."""
    for layer, ids in events:
        needed = [ExpertKey(layer, expert) for expert in dict.fromkeys(ids.flatten().tolist())]
        members = [key for key in needed if key in policy]
        before = set(policy)
        for key in members:
            policy.access(key)
        for key in needed:
            if key not in members:
                policy.insert(key, frozenset(needed))
        counters = cache.counters.clone()
        plan(cache, layer, ids)
        change = (cache.counters - counters).tolist()
        assert set(on_board(cache, Segment.PROBATION, Segment.PROTECTED)) == set(policy)
        if isinstance(policy, Slru):
            assert set(on_board(cache, Segment.PROTECTED)) == set(policy.protected)
        assert change[Counter.HITS] == len(members)
        assert change[Counter.MISSES] == len(needed) - len(members)
        assert change[Counter.EVICTIONS] == len(before - set(policy))


def host_policy(name: str, capacity: int) -> tuple[CachePolicy, int]:
    """A policy and the `protected_capacity` that makes the device cache the same."""
    return (Lru(capacity), 0) if name == "lru" else (Slru(capacity, fill=True), slru_protected(capacity))


@pytest.mark.parametrize("policy", ["lru", "slru"])
@pytest.mark.parametrize("seed", range(8))
def test_reference_follows_the_host_policy(policy: str, seed: int) -> None:
    """Capacities from too small for one event to nearly everything."""
    capacity = [2, 3, 5, 8, 13, 21, 30, 40][seed]
    host, protected = host_policy(policy, capacity)
    cache = DeviceCache.empty(4, 12, capacity=capacity, staging=0, transient=6, protected_capacity=protected)
    events = random_events(4, 12, n_tokens=1 + seed % 3, top_k=2 + seed % 3, predictions=(0, 0), n_events=300, seed=seed)
    follow(cache_plan_reference, cache, host, ((layer, ids.remainder(12)) for layer, ids, _ in events))


@pytest.mark.parametrize("policy", ["lru", "slru"])
def test_kernel_follows_the_host_policy(policy: str) -> None:
    host, protected = host_policy(policy, 13)
    cache = DeviceCache.empty(4, 12, capacity=13, staging=0, transient=4, protected_capacity=protected)
    events = random_events(4, 12, n_tokens=1, top_k=3, predictions=(0, 0), n_events=80, seed=0)
    routed = ((layer, ids.remainder(12)) for layer, ids, _ in events)  # a router never names an expert twice for one token
    follow(cache_plan, cache, host, ((layer, ids) for layer, ids in routed if len(set(ids[0].tolist())) == 3))


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"recorded routing is not at {TRACES}")
@pytest.mark.parametrize("policy", ["lru", "slru"])
@pytest.mark.parametrize(("plan", "n_tokens"), [(cache_plan_reference, 120), (cache_plan, 6)])
def test_both_follow_the_host_policy_on_recorded_routing(policy: str, plan: Plan, n_tokens: int) -> None:
    """gpt-oss-20b, 24 layers of 32 experts, top-4. A token needs 96 experts: more than a quarter of these slots, and there are hits."""
    recorded = np.load(TRACES / "mmlu_dev.npz")["ids"][:n_tokens].astype(np.int32)
    capacity = 256 if n_tokens > 50 else 100
    host, protected = host_policy(policy, capacity)
    cache = DeviceCache.empty(24, 32, capacity=capacity, staging=0, transient=4, protected_capacity=protected)
    follow(
        plan, cache, host, ((layer, torch.from_numpy(token[layer : layer + 1])) for token in recorded for layer in range(24))
    )
    assert int(cache.counters[Counter.EVICTIONS]) > 0 and int(cache.counters[Counter.HITS]) > 0


def plan_of(cache: DeviceCache, layer: int, ids: Sequence[int], predicted: Sequence[Sequence[int]] | None = None) -> CachePlan:
    return cache_plan(cache, layer, torch.tensor([ids]).int(), None if predicted is None else torch.tensor(predicted).int())


def test_a_prefetch_evicts_nobody_and_joins_when_confirmed() -> None:
    cache = DeviceCache.empty(2, 8, capacity=2, staging=2, transient=2)
    plan_of(cache, 0, [0, 1])
    plan = plan_of(cache, 0, [0, 1], [[4, 5, 6]])
    assert plan.copy_bounds.tolist() == [0, 0, 2]  # 6 found no place
    assert set(on_board(cache, Segment.PROBATION)) == {(0, 0), (0, 1)}
    assert set(on_board(cache, Segment.STAGED)) == {(1, 4), (1, 5)}
    plan = plan_of(cache, 1, [4, 7])
    assert plan.copy_bounds.tolist() == [0, 1, 1]  # only 7 had to come
    assert set(on_board(cache, Segment.PROBATION)) == {(1, 4), (1, 7)}
    assert not on_board(cache, Segment.STAGED)  # 5 was for this layer, which did without it
    count = cache.counters.tolist()
    assert (count[Counter.USEFUL], count[Counter.WASTED], count[Counter.REFUSED], count[Counter.EVICTIONS]) == (1, 1, 1, 2)


def test_lookahead_wraps_to_the_next_token() -> None:
    cache = DeviceCache.empty(3, 4, capacity=2, staging=4, transient=0)
    plan_of(cache, 2, [0], [[1], [2], [3]])
    assert set(on_board(cache, Segment.STAGED)) == {(0, 1), (1, 2), (2, 3)}


def test_ids_that_32_bits_would_take_for_experts_are_ignored() -> None:
    cache = DeviceCache.empty(2, 8, capacity=2, staging=2, transient=0)
    plan = cache_plan(cache, 0, torch.tensor([[3, 2**32 + 4]]), torch.tensor([[2**32 + 6, 5]]))
    assert plan.slot_ids.tolist() == [[0, -1]] and plan.copy_bounds.tolist() == [0, 1, 2]
    assert plan.copy_keys[:2].tolist() == [3, 8 + 5]


def test_more_experts_than_slots() -> None:
    """Two members, one transient; the fourth has no slot, and the next plan frees the transient."""
    cache = DeviceCache.empty(1, 8, capacity=2, staging=0, transient=1)
    assert plan_of(cache, 0, [3, 4, 5, 6]).slot_ids.tolist() == [[0, 1, 2, -1]]
    count = cache.counters.tolist()
    assert (count[Counter.MISSES], count[Counter.TRANSIENTS], count[Counter.UNPLACED]) == (4, 1, 1)
    assert plan_of(cache, 0, [3]).slot_ids.tolist() == [[0]]
    assert set(on_board(cache, *Segment)) - {(-1, 7)} == {(0, 3), (0, 4)}


def test_arguments_that_are_refused() -> None:
    with pytest.raises(CapacityError, match="0 members"):
        DeviceCache.empty(2, 8, capacity=0, staging=1, transient=1)
    with pytest.raises(CapacityError, match="4 members .4 protected."):
        DeviceCache.empty(2, 8, capacity=4, staging=1, transient=1, protected_capacity=4)
    with pytest.raises(KernelInputError, match=f"slots = 8193 must be between 1 and MAX_SLOTS = {MAX_SLOTS}"):
        DeviceCache.empty(200, 64, capacity=8000, staging=193, transient=0)
    cache = DeviceCache.empty(2, 8, capacity=4, staging=1, transient=1)
    ids = torch.zeros(1, 3, dtype=torch.int32)
    for arguments, message in (
        ((2, ids), "layer . 1 = 3 must be between 1 and n_layers = 2"),
        ((0, ids.float()), "ids is float32, expected int32 or int64"),
        ((0, torch.zeros(1, 9).int()), "top-k = 9 must be between 1 and n_experts = 8"),
        ((0, ids, torch.zeros(3, 1).int()), "predicted lookaheads = 3"),
        ((0, ids, torch.zeros(1, 9).int()), "predictions a layer = 9"),
        ((0, ids, torch.zeros(4).int()), "predicted has shape"),
        ((0, torch.zeros(342, 3).int()), "pairs = 1026 must be between 1 and MAX_PAIRS = 1024"),
        ((0, ids, None, CachePlan.empty(ids[:, :2], 0)), "plan.slot_ids has shape"),
        ((0, ids, None, CachePlan.empty(ids, 1)), "plan.copy_keys has shape"),
    ):
        with pytest.raises(KernelInputError, match=message):
            cache_plan(cache, *arguments)
    assert not cache.counters.any()
