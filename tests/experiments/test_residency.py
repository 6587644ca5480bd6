"""What a cache would hold at each guess, against a cache written anew in this file."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from experiments.residency import all_snapshots, with_residency
from prefetch.cache.lru import Lru
from prefetch.trace import RoutingTrace


def random_trace(n_steps: int, seed: int) -> RoutingTrace:
    """One sequence: a prefill of three tokens, then single ones; 3 layers of 6 experts, top-2; a guess for every layer, d = 1 and 4."""
    random = np.random.default_rng(seed)
    step = np.array([0, 0, 0, *range(1, n_steps)], np.int32)
    ids = np.stack([[random.permutation(6)[:2] for _ in range(3)] for _ in step]).astype(np.uint16)
    guesses = {d: np.zeros((len(step), 3, 2), np.int16) for d in (0, 1, 4)}
    return RoutingTrace(
        sequence=np.zeros(len(step), np.int32), step=step, phase=(step > 0).astype(np.uint8),
        token_ids=np.zeros(len(step), np.int32), topk_ids=ids, topk_weights=np.full(ids.shape, 0.5, np.float32), n_experts=6,
        guesses=guesses, resident={d: np.zeros((len(step), 3, 6), bool) for d in guesses},
    )  # fmt: skip


def by_hand(trace: RoutingTrace, capacity: int, held: OrderedDict) -> list[set]:
    """What an LRU of `capacity` holds after each layer call: all members of the event are touched, then the rest come in."""
    after = []
    for forward in trace.forwards():
        for layer in range(trace.n_layers):
            needed = list(dict.fromkeys(trace.topk_ids[forward.rows, layer].reshape(-1).tolist()))
            for expert in [e for e in needed if (layer, e) in held]:
                held.move_to_end((layer, expert))
            for expert in [e for e in needed if (layer, e) not in held]:
                while len(held) >= capacity:
                    held.popitem(last=False)
                held[layer, expert] = True
            after.append(set(held))
    return after


def test_residency_is_that_of_the_layer_call_that_guessed() -> None:
    traces = [random_trace(5, 1), random_trace(4, 2)]
    capacity, held = 9, OrderedDict()
    for trace, snapshots in zip(traces, all_snapshots(Lru(capacity), traces), strict=True):
        after = by_hand(trace, capacity, held)
        resident = with_residency(trace, snapshots).resident
        for index, forward in enumerate(trace.forwards()):
            for target in range(3):
                for lookahead in (0, 1, 4):
                    call = 3 * index + target - (lookahead or 1)  # through passes; before its attention as after the last call
                    expected = [call >= 0 and (target, expert) in after[call] for expert in range(6)]
                    for row in range(forward.rows.start, forward.rows.stop):
                        assert resident[lookahead][row, target].tolist() == expected
