"""A cache of experts whose books are on the device: which expert is in which slot, why, and since when.

The rules are those of `prefetch.fast_tier` over `prefetch.cache.lru` or `slru`, in tensors that a kernel reads and writes,
so that a decode step needs no word from the host. A slot is in one segment:
- free;
- transient: its expert was needed once and not admitted; free again at the next plan;
- staged: a prefetch that no router has confirmed. It evicted nobody, and leaves when its layer routes without it;
- probation, protected: the cache's members. Only the least recent of probation is ever evicted. A member that is needed
  again moves to protected, whose surplus goes back to probation as its most recent. Probation may hold whatever protected
  leaves free (the host's `Slru(fill=True)`): confined to a fixed share it would lose each expert of a token before its second
  use, wherever one token needs more experts than that share.
With protected_capacity 0 that is plain LRU.
"""

from __future__ import annotations

from collections import Counter as Multiset
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from kernels.launch import check_at_most, check_tensor
from prefetch.errors import CapacityError

MAX_SLOTS = 8_192  # all of them are in one program's registers
# Members untouched for longer than this many touches of others count as equally old, in order of slots.
OLDEST = MAX_SLOTS - 2**31
STORED_IN = 16  # slots whose books are read and written together
MAX_KEYS = 2**27  # beside its key, a word of the kernel has 4 bits for the segment


class Segment(IntEnum):
    """Why a slot's expert is there."""

    FREE = 0
    TRANSIENT = 1
    STAGED = 2
    PROBATION = 3
    PROTECTED = 4


class Counter(IntEnum):
    """Index into `DeviceCache.counters`, each over all plans since the cache was made."""

    HITS = 0  # needed experts that were members
    USEFUL = 1  # needed experts that were staged: prefetches confirmed
    MISSES = 2  # needed experts that were not on board; hits + useful + misses = needed experts, each once a call
    EVICTIONS = 3  # members that left
    TRANSIENTS = 4  # needed experts not admitted, but served from a slot
    UNPLACED = 5  # of the misses: no slot was left, slot -1
    PREFETCHES = 6  # staged
    WASTED = 7  # staged, and left unconfirmed
    REFUSED = 8  # predicted, not on board, and no staging place was free


@dataclass(frozen=True)
class DeviceCache:
    """State, changed in place by `cache_plan`. Make one with `empty`."""

    slot_of: Tensor  # int32 [L, E], -1 where absent: the table that expert kernels read
    key_of: Tensor  # int32 [S], layer * E + expert, -1 where free
    segment: Tensor  # int32 [S]
    since: Tensor  # int32 [S], when a member was last admitted, used or demoted: so many of those ago, below 0
    counters: Tensor  # int64 [9], see Counter
    capacity: int  # members
    protected_capacity: int  # of them in protected; 0 is LRU
    staging: int  # prefetches that may wait at once

    @classmethod
    def empty(
        cls,
        n_layers: int,
        n_experts: int,
        *,
        capacity: int,
        staging: int,
        transient: int,
        protected_capacity: int = 0,
        device: torch.device | str = "cpu",
    ) -> DeviceCache:
        """A cache over capacity + staging + transient slots, all free.

        Args:
            capacity: members, at least 1.
            staging: slots for prefetches; transient: slots for needed experts that are not admitted.
            protected_capacity: 0 for LRU; `slru_protected(capacity)` is SLRU.

        Raises:
            CapacityError: no place for a member, or none in probation. KernelInputError: more slots than a program holds.
        """
        if capacity < 1 or not 0 <= protected_capacity < capacity or staging < 0 or transient < 0:
            raise CapacityError(
                f"a device cache of {capacity} members ({protected_capacity} protected), {staging} staged and {transient} transient "
                "experts: it needs at least 1 member outside protected, and no count below 0"
            )
        n_slots = capacity + staging + transient
        check_at_most("slots", n_slots, "MAX_SLOTS", MAX_SLOTS)

        key_of, segment, since = torch.zeros(3, _n_stored(n_slots), dtype=torch.int32, device=device)[:, :n_slots]
        cache = cls(
            slot_of=torch.empty(n_layers, n_experts, dtype=torch.int32, device=device),
            key_of=key_of,
            segment=segment,
            since=since,
            counters=torch.empty(len(Counter), dtype=torch.int64, device=device),
            capacity=capacity,
            protected_capacity=protected_capacity,
            staging=staging,
        )
        cache.clear()
        return cache

    def clear(self) -> None:
        """All slots free, all counts zero; in place, so that a captured graph sees it."""
        for tensor, value in zip(self.tensors, (-1, -1, Segment.FREE, 0, 0), strict=True):
            tensor.fill_(value)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of the state."""
        return self.slot_of, self.key_of, self.segment, self.since, self.counters

    @property
    def n_slots(self) -> int:
        return int(self.key_of.shape[0])

    @property
    def n_stored(self) -> int:
        """Elements in the memory of each of `key_of`, `segment` and `since`, so that vector loads need no mask of their own."""
        return _n_stored(self.n_slots)

    @property
    def n_layers(self) -> int:
        return int(self.slot_of.shape[0])

    @property
    def n_experts(self) -> int:
        return int(self.slot_of.shape[1])


@dataclass(frozen=True)
class CachePlan:
    """What one plan decided, on the device. Copies are in order: demand loads, then prefetches, nearest layer first."""

    slot_ids: Tensor  # int32 [T, k], the slot of each pair's expert; -1 where the id is unknown or no slot was left
    copy_keys: Tensor  # int32 [T * k + D * M], layer * E + expert of each copy
    copy_slots: Tensor  # int32 [T * k + D * M], where it goes
    copy_bounds: Tensor  # int32 [3]: 0, the number of demand loads, the number of copies

    @classmethod
    def empty(cls, ids: Tensor, n_predicted: int) -> CachePlan:
        """Unwritten memory for the plan of `ids` [T, k] with `n_predicted` = D * M predictions."""
        like = ids.new_empty(0, dtype=torch.int32)
        n_copies = ids.numel() + n_predicted
        return cls(like.new_empty(ids.shape), like.new_empty(n_copies), like.new_empty(n_copies), like.new_empty(3))


class CacheBooks:
    """A cache's state as Python lists, and its rules one at a time: what the reference of `cache_plan` is made of."""

    def __init__(self, cache: DeviceCache):
        self.cache = cache
        self.key = cache.key_of.tolist()
        self.segment = [Segment(code) for code in cache.segment.tolist()]
        self.since = cache.since.tolist()
        self.clock = 0  # touches in this call
        self.counts: Multiset[Counter] = Multiset()

    def slot_of(self, key: int) -> int:
        return self.key.index(key) if key in self.key else -1

    def holds(self, *segments: Segment) -> list[int]:
        return [slot for slot, segment in enumerate(self.segment) if segment in segments]

    def put(self, key: int, slot: int, segment: Segment) -> None:
        self.key[slot], self.segment[slot] = key, segment

    def free(self, slot: int) -> None:
        self.put(-1, slot, Segment.FREE)

    def touch(self, slot: int, segment: Segment) -> None:
        """Most recent of `segment`."""
        self.segment[slot], self.since[slot] = segment, self.clock
        self.clock += 1

    def use(self, slot: int) -> None:
        self.touch(slot, Segment.PROTECTED)
        protected = self.holds(Segment.PROTECTED)
        if len(protected) > self.cache.protected_capacity:
            self.touch(min(protected, key=self.since.__getitem__), Segment.PROBATION)

    def make_room(self, in_use: set[int]) -> bool:
        """Room for one more member, by an eviction if need be; False if all of probation is in use."""
        if len(self.holds(Segment.PROBATION, Segment.PROTECTED)) < self.cache.capacity:
            return True
        candidates = [slot for slot in self.holds(Segment.PROBATION) if self.key[slot] not in in_use]
        if candidates:
            self.free(min(candidates, key=self.since.__getitem__))
            self.counts[Counter.EVICTIONS] += 1
        return bool(candidates)

    def place(self, key: int, segment: Segment) -> int:
        slot = self.holds(Segment.FREE)[0]
        self.put(key, slot, segment)
        return slot

    @property
    def has_spare(self) -> bool:
        """A slot is left beside those that members may claim."""
        return len(self.holds(Segment.STAGED, Segment.TRANSIENT)) < self.cache.n_slots - self.cache.capacity

    def admit(self, key: int, in_use: set[int]) -> tuple[int, bool]:
        """A needed expert that is no member: its slot, or -1, and whether it must be copied there."""
        slot = self.slot_of(key)
        self.counts[Counter.MISSES if slot < 0 else Counter.USEFUL] += 1
        admitted, copied = self.make_room(in_use), slot < 0
        self.counts[Counter.TRANSIENTS] += not admitted and (not copied or self.has_spare)
        if copied and not admitted and not self.has_spare:
            self.counts[Counter.UNPLACED] += 1
            return -1, False
        if copied:
            slot = self.place(key, Segment.PROBATION)
        if admitted:
            self.touch(slot, Segment.PROBATION)
        else:
            self.segment[slot] = Segment.TRANSIENT
        return slot, copied

    def write_back(self) -> None:
        cache = self.cache
        cache.slot_of.fill_(-1)
        for slot, key in enumerate(self.key):
            if key >= 0:
                cache.slot_of.view(-1)[key] = slot
        before_next = [since - self.clock for since in self.since]
        since = [age if age >= OLDEST else OLDEST - MAX_SLOTS + slot for slot, age in enumerate(before_next)]
        for tensor, values in ((cache.key_of, self.key), (cache.segment, self.segment), (cache.since, since)):
            tensor.copy_(tensor.new_tensor(values))
        for counter, count in self.counts.items():
            cache.counters[counter] += count


def _n_stored(n_slots: int) -> int:
    return (n_slots + STORED_IN - 1) // STORED_IN * STORED_IN


def slru_protected(capacity: int) -> int:
    """Protected's share in `prefetch.cache.slru`: all but a quarter, of at least 1, which probation always has."""
    return capacity - max(1, capacity // 4)


def check_plan_inputs(cache: DeviceCache, layer: int, ids: Tensor, predicted: Tensor | None, plan: CachePlan) -> None:
    """Refuse arguments of a plan that do not fit the cache or each other."""
    device, integers = cache.slot_of.device, [torch.int32, torch.int64]
    n_predicted = 0 if predicted is None else predicted.numel()
    check_at_most("layer + 1", layer + 1, "n_layers", cache.n_layers)
    check_tensor("ids", ids, [None, None], integers, device)
    check_at_most("top-k", ids.shape[1], "n_experts", cache.n_experts)
    if predicted is not None:
        check_tensor("predicted", predicted, [None, None], integers, device)
        check_at_most("predicted lookaheads", predicted.shape[0], "n_layers", cache.n_layers)
        check_at_most("predictions a layer", predicted.shape[1], "n_experts", cache.n_experts)
    check_tensor("plan.slot_ids", plan.slot_ids, list(ids.shape), [torch.int32], device)
    for name, tensor in (("plan.copy_keys", plan.copy_keys), ("plan.copy_slots", plan.copy_slots)):
        check_tensor(name, tensor, [ids.numel() + n_predicted], [torch.int32], device)
    check_tensor("plan.copy_bounds", plan.copy_bounds, [3], [torch.int32], device)
    check_at_most("layers x experts", cache.n_layers * cache.n_experts, "MAX_KEYS", MAX_KEYS)
