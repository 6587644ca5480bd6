"""A bound with the link in it: the fastest that any cache, predictor and planner could decode a trace.

Belady's rule says how few experts must be loaded, whatever is known in advance; a load takes its time on the link, whenever it is made;
and computing takes its own. The longer of the two is the least that decoding takes. Prefetch reaches it where it overlaps all of one with the
other; no guess, however good, gets beyond it.
"""

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
