"""How little must be loaded, whatever is known in advance: the part of a link's bound that no cache and no guess can change."""

from __future__ import annotations

from prefetch.cache.belady import belady_hits
from prefetch.trace import RoutingTrace


def fewest_loads(trace: RoutingTrace, n_slots: int, first_sequence: int = 0) -> int:
    """A lower bound on the experts that must be loaded to decode the sequences of `trace` from `first_sequence` on.

    Each sequence may begin with the best content of all `n_slots` slots for free, since prompts are not counted: that saves one load a
    slot at most. Within it no policy, and no prefetch, loads less than Belady's (1966).
    """
    events, n_layers, total = trace.routing_events(), trace.n_layers, 0
    decoded: dict[int, list] = {}
    for index, forward in enumerate(trace.forwards()):
        if forward.step > 0 and forward.sequence >= first_sequence:
            decoded.setdefault(forward.sequence, []).extend(events[index * n_layers : (index + 1) * n_layers])
    for of_sequence in decoded.values():
        total += max(0, belady_hits(of_sequence, n_slots).misses - n_slots)
    return total
