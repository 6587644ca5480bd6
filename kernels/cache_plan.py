"""Plan one layer call's cache on the device: what hits, what leaves, what is copied where. One launch, one program.

In order: transients of the last plan leave; prefetches for this layer that it does not need leave; needed members are used;
needed experts that are not members are admitted, confirmed prefetches among them, evicting members that this call does not
need; then predictions are staged where places are free. Experts count once a call, in order of first appearance.

All integers, and the slots' books stay in registers: nothing but latency. Bytes: 16 a slot, read and written. Reductions over
the slots: one or two for each needed expert, three for a miss, two for a prediction. Sequential in the pairs by nature (each
admission depends on the last), so meant for decode.

A copy into a slot may begin when all kernels that read the slot's last expert are done, as on one stream. Prefetches on a
stream of their own must have arrived before the next plan's copies begin, since that plan may reuse their slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compile_case import CompileCase, Expectations
from kernels.device_cache import CacheBooks, CachePlan, Counter, DeviceCache, Segment, check_plan_inputs
from kernels.launch import Launch, check_at_most, check_launchable

MAX_PAIRS = 1024
SLOTS_PER_WARP = 64  # with twice or four times as many, registers spill
MAX_WARPS = 16 if torch.version.hip else 32  # 1,024 threads

_FREE, _TRANSIENT, _STAGED, _PROBATION, _PROTECTED = (tl.constexpr(int(segment)) for segment in Segment)
_HITS, _USEFUL, _MISSES, _EVICTIONS, _TRANSIENTS, _UNPLACED, _PREFETCHES, _WASTED, _REFUSED = (
    tl.constexpr(int(counter)) for counter in Counter
)
_NEVER = tl.constexpr(1 << 62)  # later than any stamp


def cache_plan(
    cache: DeviceCache, layer: int, ids: Tensor, predicted: Tensor | None = None, plan: CachePlan | None = None
) -> CachePlan:
    """Bring `cache` to the state after one layer call.

    Args:
        cache: changed in place.
        layer: the MoE layer that routes.
        ids: int32 or int64 [T, k], its choice; ids outside 0..E-1 are ignored.
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
    n_slots_padded = max(32, triton.next_power_of_2(cache.n_slots))
    return Launch(
        _plan_kernel,
        (1,),
        {
            "ids_ptr": ids,
            "predicted_ptr": predicted,
            "slot_of_ptr": cache.slot_of,
            "key_of_ptr": cache.key_of,
            "segment_ptr": cache.segment,
            "stamp_ptr": cache.stamp,
            "clock_ptr": cache.clock,
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
            "capacity": cache.capacity,
            "protected_capacity": cache.protected_capacity,
            "staging": cache.staging,
            "ONE_TOKEN": ids.shape[0] == 1,
            "PAIRS": max(16, triton.next_power_of_2(ids.numel())),
            "SLOTS": n_slots_padded,
        },
        num_warps=min(max(n_slots_padded // SLOTS_PER_WARP, 1), MAX_WARPS),
    )


def compile_cases() -> list[CompileCase]:
    """For the ahead-of-time compiler: 12 GB of Qwen3-30B-A3B's experts in bf16, SLRU, with and without predictions, 1 and 4 tokens."""
    cache = DeviceCache.empty(48, 128, capacity=1228, staging=32, transient=8, protected_capacity=921, device="meta")
    cases = []
    for n_tokens, n_predicted in ((1, 0), (1, 16), (4, 16)):
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


@triton.jit
def _plan_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, predicted_ptr, slot_of_ptr, key_of_ptr, segment_ptr, stamp_ptr, clock_ptr, counters_ptr,
    slot_ids_ptr, copy_keys_ptr, copy_slots_ptr, copy_bounds_ptr,
    layer, n_layers, n_experts, n_pairs, n_predicted, per_lookahead, n_slots, capacity, protected_capacity, staging,
    ONE_TOKEN: tl.constexpr, PAIRS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The books are blocks of SLOTS in registers: one slot is read by a reduction and written by a `where`."""
    slot = tl.arange(0, SLOTS)
    exists = slot < n_slots
    key_of = tl.load(key_of_ptr + slot, mask=exists, other=-1)
    segment = tl.load(segment_ptr + slot, mask=exists, other=-1)
    stamp = tl.load(stamp_ptr + slot, mask=exists, other=0)
    clock = tl.load(clock_ptr)
    pair = tl.arange(0, PAIRS)
    wanted = tl.load(ids_ptr + pair, mask=pair < n_pairs, other=-1).to(tl.int32)
    wanted = tl.where((wanted >= 0) & (wanted < n_experts), layer * n_experts + wanted, -1)
    slot_ids = tl.full([PAIRS], -1, tl.int32)

    counter = tl.arange(0, 16)
    counts = tl.zeros([16], tl.int64)

    in_use = slot < 0
    for index in range(0, n_pairs):
        in_use |= key_of == _needed(ids_ptr + index, layer, n_experts)
    expired = (segment == _STAGED) & ~in_use & (key_of // n_experts == layer)
    counts += tl.where(counter == _WASTED, tl.sum(expired.to(tl.int32)), 0)
    leaves = expired | (segment == _TRANSIENT)
    key_of = tl.where(leaves, -1, key_of)
    segment = tl.where(leaves, _FREE, segment)
    n_staged = tl.sum((segment == _STAGED).to(tl.int32))
    n_probation = tl.sum((segment == _PROBATION).to(tl.int32))
    n_protected = tl.sum((segment == _PROTECTED).to(tl.int32))

    for index in range(0, n_pairs):  # members are used
        key = _needed(ids_ptr + index, layer, n_experts)
        at, why = _find(key, key_of, segment, slot, SLOTS)
        if (why >= _PROBATION) & (ONE_TOKEN or _is_first(key, index, wanted, pair)):
            slot_ids = tl.where(wanted == key, at, slot_ids)
            counts += (counter == _HITS).to(tl.int64)
            if why == _PROBATION:
                n_probation -= 1
                n_protected += 1
            segment = tl.where(slot == at, _PROTECTED, segment)
            stamp = tl.where(slot == at, clock, stamp)
            clock += 1
            if n_protected > protected_capacity:
                tail = tl.min(tl.where(segment == _PROTECTED, stamp * SLOTS + slot, _NEVER)) % SLOTS
                segment = tl.where(slot == tail, _PROBATION, segment)
                stamp = tl.where(slot == tail, clock, stamp)
                clock += 1
                n_probation += 1
                n_protected -= 1

    n_copies = 0
    n_transient = 0
    for index in range(0, n_pairs):  # the others are admitted
        key = _needed(ids_ptr + index, layer, n_experts)
        at, why = _find(key, key_of, segment, slot, SLOTS)
        if (key >= 0) & (why < _PROBATION) & (ONE_TOKEN or _is_first(key, index, wanted, pair)):
            missing = at == SLOTS
            counts += (counter == tl.where(missing, _MISSES, _USEFUL)).to(tl.int64)
            if n_probation + n_protected >= capacity:
                victim = tl.min(tl.where((segment == _PROBATION) & ~in_use, stamp * SLOTS + slot, _NEVER))
                if victim < _NEVER:
                    key_of = tl.where(slot == victim % SLOTS, -1, key_of)
                    segment = tl.where(slot == victim % SLOTS, _FREE, segment)
                    counts += (counter == _EVICTIONS).to(tl.int64)
                    n_probation -= 1
            admitted = n_probation + n_protected < capacity
            if missing & (admitted | (n_staged + n_transient < n_slots - capacity)):
                at = tl.min(tl.where(segment == _FREE, slot, SLOTS))
                tl.store(copy_keys_ptr + n_copies, key)
                tl.store(copy_slots_ptr + n_copies, at)
                n_copies += 1
            if at == SLOTS:
                counts += (counter == _UNPLACED).to(tl.int64)
            else:
                n_staged -= tl.where(missing, 0, 1)
                n_probation += tl.where(admitted, 1, 0)
                n_transient += tl.where(admitted, 0, 1)
                counts += ((counter == _TRANSIENTS) & (admitted == 0)).to(tl.int64)
                key_of = tl.where(slot == at, key, key_of)
                segment = tl.where(slot == at, tl.where(admitted, _PROBATION, _TRANSIENT), segment)
                stamp = tl.where((slot == at) & admitted, clock, stamp)
                clock += tl.where(admitted, 1, 0)
                in_use |= slot == at
                slot_ids = tl.where(wanted == key, at, slot_ids)

    n_demand = n_copies
    if predicted_ptr is not None:
        for index in range(0, n_predicted):  # predictions are staged
            target = (layer + 1 + index // per_lookahead) % n_layers
            key = _needed(predicted_ptr + index, target, n_experts)
            at, why = _find(key, key_of, segment, slot, SLOTS)
            if (key >= 0) & (at == SLOTS):
                if (n_staged < staging) & (n_staged + n_transient < n_slots - capacity):
                    place = tl.min(tl.where(segment == _FREE, slot, SLOTS))
                    tl.store(copy_keys_ptr + n_copies, key)
                    tl.store(copy_slots_ptr + n_copies, place)
                    key_of = tl.where(slot == place, key, key_of)
                    segment = tl.where(slot == place, _STAGED, segment)
                    n_copies += 1
                    n_staged += 1
                    counts += (counter == _PREFETCHES).to(tl.int64)
                else:
                    counts += (counter == _REFUSED).to(tl.int64)

    before = tl.load(key_of_ptr + slot, mask=exists, other=-1)
    tl.store(slot_of_ptr + before, -1, mask=(before >= 0) & (before != key_of))
    tl.debug_barrier()  # an expert may have left one slot and come back in another: its new entry must be the later store
    tl.store(slot_of_ptr + key_of, slot, mask=(key_of >= 0) & (before != key_of))
    tl.store(key_of_ptr + slot, key_of, mask=exists)
    tl.store(segment_ptr + slot, segment, mask=exists)
    tl.store(stamp_ptr + slot, stamp, mask=exists)
    tl.store(clock_ptr, clock)
    is_counter = counter <= _REFUSED
    tl.store(counters_ptr + counter, tl.load(counters_ptr + counter, mask=is_counter, other=0) + counts, mask=is_counter)
    tl.store(slot_ids_ptr + pair, slot_ids, mask=pair < n_pairs)
    bound = tl.arange(0, 4)
    bounds = tl.where(bound == 0, 0, tl.where(bound == 1, n_demand, n_copies))
    tl.store(copy_bounds_ptr + bound, bounds, mask=bound < 3)


@triton.jit
def _needed(id_ptr, layer, n_experts):  # type: ignore[no-untyped-def]
    """Expert key, or -2 (which no slot holds) where the id is unknown."""
    expert = tl.load(id_ptr)
    return tl.where((expert >= 0) & (expert < n_experts), layer * n_experts + expert, -2).to(tl.int32)


@triton.jit
def _find(key, key_of, segment, slot, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(slot, segment) of `key` by one reduction; (SLOTS, free) if it is nowhere."""
    found = tl.min(tl.where(key_of == key, slot * 8 + segment, SLOTS * 8))
    return found // 8, found % 8


@triton.jit
def _is_first(key, index, wanted, pair):  # type: ignore[no-untyped-def]
    """No pair before `index` wants `key`."""
    return tl.sum(((wanted == key) & (pair < index)).to(tl.int32)) == 0
