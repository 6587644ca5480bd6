"""Plan one layer call's cache on the device: what hits, what leaves, what is copied where. One launch, one program.

In order: transients of the last plan leave; prefetches for this layer that it does not need leave; needed members are used;
needed experts that are not members are admitted, confirmed prefetches among them, evicting members that this call does not
need; then predictions are staged where places are free. Experts count once a call, in order of first appearance.

All integers, and the slots' books stay in registers: nothing but latency. Bytes: 12 a slot, read and written. Reductions over
the slots: two a call, one for a demotion, two for a miss, one for a staged prediction; hits need none. Sequential in the pairs by
nature (each admission depends on the last), so meant for decode.

A copy into a slot may begin when all kernels that read the slot's last expert are done, as on one stream. Prefetches on a
stream of their own must have arrived before the next plan's copies begin, since that plan may reuse their slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compile_case import CompileCase, Expectations
from kernels.device_cache import (
    MAX_SLOTS,
    OLDEST,
    CacheBooks,
    CachePlan,
    Counter,
    DeviceCache,
    Segment,
    check_plan_inputs,
    slru_protected,
)
from kernels.integers import next_power_of_2
from kernels.launch import Launch, check_at_most, check_launchable

MAX_PAIRS = 1024
RUNTIME_SIZES = [  # one program for every layer and cache
    "layer", "n_layers", "n_experts", "n_pairs", "n_predicted", "per_lookahead", "n_slots", "capacity", "protected_capacity", "staging",
]  # fmt: skip

_FREE, _TRANSIENT, _STAGED, _PROBATION, _PROTECTED = (tl.constexpr(int(segment)) for segment in Segment)
_HITS, _USEFUL, _MISSES, _EVICTIONS, _TRANSIENTS, _UNPLACED, _PREFETCHES, _WASTED, _REFUSED = (
    tl.constexpr(int(counter)) for counter in Counter
)
_IN_USE = tl.constexpr(8)  # added to the segment of what this call needs and has placed: nothing evicts it
_EMPTY = tl.constexpr(-16)  # what a free slot holds
_NO_SLOT = tl.constexpr(-9)  # past the last slot: in none of the segments
_NEVER = tl.constexpr(2**31 - 1)  # later than any stamp
_OLDEST = tl.constexpr(OLDEST)
_SLOTS = tl.constexpr(MAX_SLOTS)


def cache_plan(
    cache: DeviceCache, layer: int, ids: Tensor, predicted: Tensor | None = None, plan: CachePlan | None = None
) -> CachePlan:
    """Bring `cache` to the state after one layer call.

    Args:
        cache: changed in place.
        layer: the MoE layer that routes.
        ids: int32 or int64 [T, k], its choice, no expert twice for one token; ids outside 0..E-1 are ignored.
        predicted: int32 or int64 [D, M], row d - 1 for the layer d further on (after the last comes the first, of the next
            token), likeliest first; ids outside 0..E-1 are ignored. None predicts nothing.
        plan: memory for the result; by default new.

    Returns:
        `plan`.

    Raises:
        KernelInputError: arguments that do not fit; nothing has been launched then.
    """
    plan = plan or CachePlan.empty(ids, 0 if predicted is None else predicted.numel())
    launch = plan_launch(cache, layer, ids, predicted, plan)
    check_launchable(ids.device)
    launch.run()
    return plan


def plan_launch(cache: DeviceCache, layer: int, ids: Tensor, predicted: Tensor | None, plan: CachePlan) -> Launch:
    """The launch, checked and not yet run."""
    check_plan_inputs(cache, layer, ids, predicted, plan)
    check_at_most("(token, expert) pairs", ids.numel(), "MAX_PAIRS", MAX_PAIRS)
    n_slots_padded = max(32, next_power_of_2(cache.n_slots))
    return Launch(
        _plan_kernel,
        (1,),
        {
            "ids_ptr": ids,
            "predicted_ptr": predicted,
            "slot_of_ptr": cache.slot_of,
            "key_of_ptr": cache.key_of,
            "segment_ptr": cache.segment,
            "since_ptr": cache.since,
            "counters_ptr": cache.counters,
            "slot_ids_ptr": plan.slot_ids,
            "copy_keys_ptr": plan.copy_keys,
            "copy_slots_ptr": plan.copy_slots,
            "copy_bounds_ptr": plan.copy_bounds,
            "layer": layer,
            "n_layers": cache.n_layers,
            "n_experts": cache.n_experts,
            "n_pairs": ids.numel(),
            "n_predicted": 0 if predicted is None else predicted.numel(),
            "per_lookahead": 1 if predicted is None else predicted.shape[1],
            "n_slots": cache.n_slots,
            "n_stored": cache.n_stored,
            "capacity": cache.capacity,
            "protected_capacity": cache.protected_capacity,
            "staging": cache.staging,
            "ONE_TOKEN": ids.shape[0] == 1,
            "PAIRS": max(32, next_power_of_2(ids.numel())),
            "GUESSES": 32 if predicted is None else max(32, next_power_of_2(predicted.numel())),
            "SLOTS": n_slots_padded,
        },
        num_warps=_num_warps(n_slots_padded),
    )


def _num_warps(n_slots_padded: int) -> int:
    """8 slots a thread; 32 where there are many: at 16, ptxas spills 8 bytes for the sake of a second program that never comes."""
    return max(n_slots_padded // (256 if n_slots_padded <= 2048 else 1024), 1)


def compile_cases() -> list[CompileCase]:
    """For the ahead-of-time compiler: 12 GB of Qwen3-30B-A3B's experts in bf16, SLRU, with and without predictions, 1 and 4 tokens;
    and larger caches, up to the most."""
    cases = []
    for capacity, n_tokens, n_predicted in ((1228, 1, 0), (1228, 1, 16), (1228, 4, 16), (4056, 1, 16), (MAX_SLOTS - 40, 4, 16)):
        cache = DeviceCache.empty(
            64, 128, capacity=capacity, staging=32, transient=8, protected_capacity=slru_protected(capacity), device="meta"
        )
        ids = torch.empty(n_tokens, 8, dtype=torch.int32, device="meta")
        predicted = torch.empty(2, n_predicted // 2, dtype=torch.int32, device="meta") if n_predicted else None
        launch = plan_launch(cache, 0, ids, predicted, CachePlan.empty(ids, n_predicted))
        name = f"Qwen3-30B-A3B T={n_tokens} {cache.n_slots} slots, {n_predicted} predictions"
        cases.append(CompileCase(name, launch, Expectations(max_registers=255)))  # one program: nobody waits for its registers
    return cases


def cache_plan_reference(
    cache: DeviceCache, layer: int, ids: Tensor, predicted: Tensor | None = None, plan: CachePlan | None = None
) -> CachePlan:
    """The same, in plain Python: what `cache_plan` must do to the last bit. Entries of `plan` past the copies are left alone."""
    plan = plan or CachePlan.empty(ids, 0 if predicted is None else predicted.numel())
    check_plan_inputs(cache, layer, ids, predicted, plan)
    n_experts, books, copies = cache.n_experts, CacheBooks(cache), []
    pairs = [layer * n_experts + expert if 0 <= expert < n_experts else -1 for expert in ids.flatten().tolist()]
    needed = list(dict.fromkeys(key for key in pairs if key >= 0))
    in_use, slots = set(needed), {-1: -1}

    for slot in books.holds(Segment.TRANSIENT):
        books.free(slot)
    for slot in books.holds(Segment.STAGED):
        if books.key[slot] // n_experts == layer and books.key[slot] not in in_use:
            books.free(slot)
            books.counts[Counter.WASTED] += 1
    members = [key for key in needed if books.slot_of(key) in books.holds(Segment.PROBATION, Segment.PROTECTED)]
    for key in members:
        slots[key] = books.slot_of(key)
        books.use(slots[key])
        books.counts[Counter.HITS] += 1
    for key in needed:
        if key not in members:
            slots[key], copied = books.admit(key, in_use)
            copies += [(key, slots[key])] if copied else []
    n_demand = len(copies)
    for lookahead, likely in enumerate([] if predicted is None else predicted.tolist(), start=1):
        for expert in likely:
            key = (layer + lookahead) % cache.n_layers * n_experts + expert
            if not 0 <= expert < n_experts or books.slot_of(key) >= 0:
                continue
            staged = len(books.holds(Segment.STAGED)) < cache.staging and books.has_spare
            books.counts[Counter.PREFETCHES if staged else Counter.REFUSED] += 1
            if staged:
                copies.append((key, books.place(key, Segment.STAGED)))
    books.write_back()
    plan.slot_ids.copy_(plan.slot_ids.new_tensor([slots[key] for key in pairs]).view_as(plan.slot_ids))
    for index, (key, slot) in enumerate(copies):
        plan.copy_keys[index], plan.copy_slots[index] = key, slot
    plan.copy_bounds.copy_(plan.copy_bounds.new_tensor([0, n_demand, len(copies)]))
    return plan


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _plan_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, predicted_ptr, slot_of_ptr, key_of_ptr, segment_ptr, since_ptr, counters_ptr,
    slot_ids_ptr, copy_keys_ptr, copy_slots_ptr, copy_bounds_ptr,
    layer, n_layers, n_experts, n_pairs, n_predicted, per_lookahead, n_slots, n_stored, capacity, protected_capacity, staging,
    ONE_TOKEN: tl.constexpr, PAIRS: tl.constexpr, GUESSES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Three blocks in registers: the slots, the pairs and the guesses, the last two with what the books say of their experts.

    Pairs and guesses are looked up once, through the table, and follow every change, so that no expert is searched for among the
    slots. What does reduce over the slots: the tail of protected, a victim, a free slot.
    A slot is two words: what it holds, key * 16 + segment, and since when. Two members never have the same `since`.
    """
    pair = tl.arange(0, PAIRS)
    wanted = _keys(ids_ptr, pair, n_pairs, layer, n_experts)
    guess = tl.arange(0, GUESSES)
    guessed = tl.full([GUESSES], -1, tl.int32)
    if predicted_ptr is not None:
        guessed = _keys(predicted_ptr, guess, n_predicted, (layer + 1 + guess // per_lookahead) % n_layers, n_experts)
    slot = tl.arange(0, SLOTS)
    stored = slot < n_stored
    held = tl.load(key_of_ptr + slot, mask=stored, other=-1) * 16 + tl.load(segment_ptr + slot, mask=stored, other=0)
    held = tl.where(slot < n_slots, held, _NO_SLOT)
    since = tl.load(since_ptr + slot, mask=stored, other=0)
    at, why, why_since = _look_up(wanted, slot_of_ptr, segment_ptr, since_ptr)
    guess_at, guess_why, guess_since = _look_up(guessed, slot_of_ptr, segment_ptr, since_ptr)
    counter = tl.arange(0, 16)
    counts = tl.zeros([16], tl.int32)
    clock = 0

    at = tl.where(why == _TRANSIENT, -1, at)
    why = tl.where(why == _TRANSIENT, _FREE, why)
    guess_since = tl.where(guess_why >= _PROBATION, guess_since, _NEVER)
    stays = (guess_why >= _PROBATION) | ((guess_why == _STAGED) & (guessed // n_experts != layer))
    guess_at = tl.where(stays, guess_at, -1)
    confirmed = why == _STAGED
    index = tl.min(tl.where(confirmed, pair, PAIRS))
    while index < PAIRS:
        held = tl.where(slot == _at(at, pair, index), held | _IN_USE, held)
        confirmed = confirmed & (pair != index)
        index = tl.min(tl.where(confirmed, pair, PAIRS))
    of_layer = (held >= layer * n_experts * 16) & (held < (layer + 1) * n_experts * 16)
    expired = of_layer & ((held & 15) == _STAGED)
    held = tl.where(expired | ((held & 7) == _TRANSIENT), _EMPTY, held)
    segment = held & 7
    probation_staged = tl.sum((segment == _PROBATION).to(tl.int32) + ((segment == _STAGED).to(tl.int32) << 16))
    protected_expired = tl.sum((segment == _PROTECTED).to(tl.int32) + (expired.to(tl.int32) << 16))
    n_protected, n_staged = protected_expired & 0xFFFF, probation_staged >> 16
    n_members = n_protected + (probation_staged & 0xFFFF)
    counts += tl.where(counter == _WASTED, protected_expired >> 16, 0)

    for index in range(0, n_pairs):  # members are used
        found = _at((at + 1) * 8 + why, pair, index)
        if (found % 8 >= _PROBATION) & (ONE_TOKEN or _is_first(_at(wanted, pair, index), index, wanted, pair)):
            used = found // 8 - 1
            counts += (counter == _HITS).to(tl.int32)
            n_protected += tl.where(found % 8 == _PROBATION, 1, 0)
            held = tl.where(slot == used, (held & -16) + (_PROTECTED + _IN_USE), held)
            since = tl.where(slot == used, clock, since)
            why = tl.where(at == used, _PROTECTED, why)
            why_since = tl.where(at == used, clock, why_since)
            clock += 1
            if n_protected > protected_capacity:
                protected = (held & 7) == _PROTECTED
                tail = tl.min(tl.where(protected, since, _NEVER))
                is_tail = protected & (since == tail)
                held = tl.where(is_tail, held - _PROTECTED + _PROBATION, held)
                since = tl.where(is_tail, clock, since)
                is_tail_too = (why == _PROTECTED) & (why_since == tail)
                why = tl.where(is_tail_too, _PROBATION, why)
                why_since = tl.where(is_tail_too, clock, why_since)
                guess_since = tl.where(guess_since == tail, clock, guess_since)
                clock += 1
                n_protected -= 1

    n_copies = 0
    n_transient = 0
    waiting = (wanted >= 0) & (why < _PROBATION)
    index = tl.min(tl.where(waiting, pair, PAIRS))
    while index < PAIRS:  # the others are admitted
        key = _at(wanted, pair, index)
        place = _at(at, pair, index)
        missing = place < 0
        counts += (counter == tl.where(missing, _MISSES, _USEFUL)).to(tl.int32)
        if n_members >= capacity:
            may_leave = (held & 15) == _PROBATION
            victim = tl.min(tl.where(may_leave, since, _NEVER))
            if victim < _NEVER:
                held = tl.where(may_leave & (since == victim), _EMPTY, held)
                guess_at = tl.where(guess_since == victim, -1, guess_at)
                counts += (counter == _EVICTIONS).to(tl.int32)
                n_members -= 1
        admitted = n_members < capacity
        if missing & (admitted | (n_staged + n_transient < n_slots - capacity)):
            place = _copy_to_free(key, n_copies, held, slot, copy_keys_ptr, copy_slots_ptr, SLOTS)
            n_copies += 1
        if place < 0:
            counts += (counter == _UNPLACED).to(tl.int32)
        else:
            n_staged -= tl.where(missing, 0, 1)
            n_members += tl.where(admitted, 1, 0)
            n_transient += tl.where(admitted, 0, 1)
            counts += ((counter == _TRANSIENTS) & (admitted == 0)).to(tl.int32)
            held = tl.where(slot == place, key * 16 + tl.where(admitted, _PROBATION + _IN_USE, _TRANSIENT), held)
            since = tl.where((slot == place) & admitted, clock, since)
            clock += tl.where(admitted, 1, 0)
            at = tl.where(wanted == key, place, at)
        waiting = waiting & (wanted != key)
        index = tl.min(tl.where(waiting, pair, PAIRS))

    n_demand = n_copies
    if predicted_ptr is not None:
        if (
            n_predicted > (n_layers - 1) * per_lookahead
        ):  # the next token's call of this layer: it may need what this call needed
            for index in range(0, n_pairs):
                guess_at = tl.where(guessed == _at(wanted, pair, index), _at(at, pair, index), guess_at)
        absent = (guessed >= 0) & (guess_at < 0)
        index = tl.min(tl.where(absent, guess, GUESSES))
        while (
            (index < GUESSES) & (n_staged < staging) & (n_staged + n_transient < n_slots - capacity)
        ):  # predictions are staged
            key = _at(guessed, guess, index)
            place = _copy_to_free(key, n_copies, held, slot, copy_keys_ptr, copy_slots_ptr, SLOTS)
            held = tl.where(slot == place, key * 16 + _STAGED, held)
            guess_at = tl.where(guessed == key, place, guess_at)
            n_copies += 1
            n_staged += 1
            absent = absent & (guessed != key)
            index = tl.min(tl.where(absent, guess, GUESSES))
        counts += tl.where(counter == _PREFETCHES, n_copies - n_demand, 0)
        counts += tl.where(counter == _REFUSED, tl.sum(absent.to(tl.int32)), 0)

    before = tl.load(key_of_ptr + slot, mask=stored, other=-1)  # again: kept until here it would take a register a slot
    gone = tl.where((slot < n_slots) & (before != held >> 4), before, -1)
    tl.store(key_of_ptr + slot, held >> 4, mask=stored)
    tl.store(segment_ptr + slot, held & 7, mask=stored)
    tl.store(since_ptr + slot, tl.where(since < clock + _OLDEST, slot + (_OLDEST - _SLOTS), since - clock), mask=stored)
    tl.store(slot_of_ptr + gone, -1, mask=gone >= 0)
    tl.debug_barrier()  # one that left may have come back, in another slot: its new entry must be the later store
    tl.store(slot_of_ptr + wanted, at, mask=at >= 0)
    tl.store(slot_of_ptr + guessed, guess_at, mask=guess_at >= 0)
    is_counter = counter <= _REFUSED
    tl.store(counters_ptr + counter, tl.load(counters_ptr + counter, mask=is_counter, other=0) + counts, mask=is_counter)
    tl.store(slot_ids_ptr + pair, at, mask=pair < n_pairs)
    bound = tl.arange(0, 4)
    bounds = tl.where(bound == 0, 0, tl.where(bound == 1, n_demand, n_copies))
    tl.store(copy_bounds_ptr + bound, bounds, mask=bound < 3)


@triton.jit
def _look_up(keys, slot_of_ptr, segment_ptr, since_ptr):  # type: ignore[no-untyped-def]
    """(slot, segment, since) of experts: -1 and free where they are not on board."""
    at = tl.load(slot_of_ptr + keys, mask=keys >= 0, other=-1)
    segment = tl.load(segment_ptr + at, mask=at >= 0, other=_FREE)
    return at, segment, tl.load(since_ptr + at, mask=at >= 0, other=0)


@triton.jit
def _copy_to_free(key, n_copies, held, slot, copy_keys_ptr, copy_slots_ptr, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """List the copy of `key` into the first free slot, which is returned."""
    place = tl.min(tl.where(held == _EMPTY, slot, SLOTS))
    tl.store(copy_keys_ptr + n_copies, key)
    tl.store(copy_slots_ptr + n_copies, place)
    return place


@triton.jit
def _keys(ids_ptr, index, n, layer, n_experts):  # type: ignore[no-untyped-def]
    """Expert keys of `n` ids, -1 where the id is unknown."""
    expert = tl.load(ids_ptr + index, mask=index < n, other=-1)
    return tl.where((expert >= 0) & (expert < n_experts), layer * n_experts + expert, -1).to(tl.int32)


@triton.jit
def _at(values, place, index):  # type: ignore[no-untyped-def]
    """values[index]: one reduction, within a warp for up to 32 values."""
    return tl.sum(tl.where(place == index, values, 0))


@triton.jit
def _is_first(key, index, wanted, pair):  # type: ignore[no-untyped-def]
    """No pair before `index` wants `key`."""
    return tl.sum(((wanted == key) & (pair < index)).to(tl.int32)) == 0
