"""Which experts a cache would hold when a guess is made, by replaying recorded routing: what makes an activation cold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefetch.cache.base import CachePolicy
from prefetch.cache.replay import replay_hits
from prefetch.trace import RoutingTrace

Snapshots = NDArray[np.bool_]  # [layer calls, L, E]: what is held when that layer call has placed its misses


def snapshots(policy: CachePolicy, trace: RoutingTrace) -> Snapshots:
    """Run `policy`, from its present state, over `trace`; what it holds after each layer call."""
    n_layers, n_experts = trace.n_layers, trace.n_experts
    events = trace.routing_events()
    held = np.zeros((len(events), n_layers, n_experts), bool)
    for call, event in enumerate(events):
        replay_hits(policy, [event])
        if members := list(policy):
            held[call][*zip(*members, strict=True)] = True
    return held


def with_residency(trace: RoutingTrace, held: Snapshots) -> RoutingTrace:
    """`trace` with `resident` as the cache of `held` had it when each guess was made."""
    resident = {lookahead: _at_guess(trace, held, lookahead) for lookahead in trace.guesses}
    return dataclasses.replace(trace, resident=resident)


def _at_guess(trace: RoutingTrace, held: Snapshots, lookahead: int) -> NDArray[np.bool_]:
    """[N, L, E]: a guess was made `lookahead` layer calls before the one it is for; before its attention that is as after the last."""
    found = np.zeros((trace.n_tokens, trace.n_layers, trace.n_experts), bool)
    for index, forward in enumerate(trace.forwards()):
        for target in range(trace.n_layers):
            call = index * trace.n_layers + target - max(lookahead, 1)
            if call >= 0:
                found[forward.rows, target] = held[call, target]
    return found


def all_snapshots(policy: CachePolicy, traces: Sequence[RoutingTrace]) -> list[Snapshots]:
    """`snapshots` of each trace in turn; the cache stays warm from one to the next, as in a run."""
    return [snapshots(policy, trace) for trace in traces]
