"""The most hits that any demand cache could have had, knowing the future (Belady 1966, MIN).

After each routing event keep, of what is cached and what was just used, the experts whose next use is nearest; an expert
may be used without being kept (bypass). All experts being of one size, swapping a kept expert for one needed sooner never
loses a hit, so no policy without prefetch has more hits. It is a bound, not a policy: it may drop a hit at the end of the
very event that used it in favour of one of that event's misses, which `in_use` forbids the policies.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from heapq import heapify, heappop, heappush

from prefetch.cache.replay import ReplayCounts
from prefetch.errors import CapacityError
from prefetch.geometry import ExpertKey

NEVER = -1  # no later event needs the expert


def belady_hits(
    events: Sequence[Sequence[ExpertKey]],
    capacity: int,
    counted: Sequence[bool] | None = None,
    preloaded: Collection[ExpertKey] = (),
) -> ReplayCounts:
    """Bound on the hits over `events` with `capacity` slots. O(n log n) in the number n of activations.

    Args:
        events: per layer call, the distinct experts it needs.
        capacity: experts that can be kept at once. For a bound per layer, pass that layer's events and its share.
        counted: which events enter the counts (all use the cache); None counts all.
        preloaded: what is held before the first event, at most `capacity` experts.
    """
    if capacity < 1:
        raise CapacityError(f"a Belady bound needs at least 1 slot, got {capacity}")
    next_uses, first_use_of = _next_uses(events)
    next_use_of = {key: first_use_of[key] for key in preloaded if key in first_use_of}  # the cached experts
    farthest = [(-use, key) for key, use in next_use_of.items()]  # heap of (-next use, key); stale once the key was used again
    heapify(farthest)
    needed: list[ExpertKey] = []
    hits: list[ExpertKey] = []
    for index, (event, event_next_uses) in enumerate(zip(events, next_uses, strict=True)):
        if counted is None or counted[index]:
            needed.extend(event)
            hits.extend(key for key in event if key in next_use_of)
        for key, next_use in zip(event, event_next_uses, strict=True):
            if next_use == NEVER:
                next_use_of.pop(key, None)
            else:
                next_use_of[key] = next_use
                heappush(farthest, (-next_use, key))
        # A stale entry names a past event, so it never comes before those of the experts now cached.
        while len(next_use_of) > capacity:
            del next_use_of[heappop(farthest)[1]]
    return ReplayCounts.from_outcomes(needed, hits)


def _next_uses(events: Sequence[Sequence[ExpertKey]]) -> tuple[list[list[int]], dict[ExpertKey, int]]:
    """For each activation, the index of the next event that needs the same expert, or NEVER; and each expert's first event."""
    upcoming: dict[ExpertKey, int] = {}
    reversed_uses = []
    for index in range(len(events) - 1, -1, -1):
        reversed_uses.append([upcoming.get(key, NEVER) for key in events[index]])
        upcoming.update((key, index) for key in events[index])
    reversed_uses.reverse()
    return reversed_uses, upcoming
