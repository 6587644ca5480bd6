"""How a GPU kernel is timed: CUDA-graph replay over rotating weights, medians, in two rounds that are apart in time.

A measurement has a budget, so that a slow peer does not take the time of ten others: it is repeated as often as the budget allows.
A graph holds about a millisecond of work and begins behind a short sleep of the GPU: the latency of launching it is not in the time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scripts.gpu.forked import first_line

BUDGET_S = 0.2  # of one median
FEWEST_REPLAYS, MOST_REPLAYS = 5, 100
SLOW_PASS_S = 0.02  # a pass that takes so long is warm after one
N_WARMUP = 3
GRAPH_S = 1e-3  # of work in a graph
MOST_CAPTURED = 500  # calls in a graph
SLEEP_CYCLES = 500_000  # a quarter of a millisecond: longer than it takes to launch such a graph
SPIN_S = 0.15

Calls = Sequence[Callable[[], Any]]  # the same work on different weights, one after the other


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: two medians, with those that take turns with it timed in between. Their gap is the spread to believe in."""

    first_us: float
    second_us: float | None
    captured: bool  # by a CUDA graph; otherwise launches from Python are in the time
    n_replays: int  # that each median is over
    no_second: str | None = None  # why there is no second median

    @property
    def us(self) -> float:
        return self.first_us if self.second_us is None else min(self.first_us, self.second_us)


def time_in_turn(providers: Mapping[str, Calls]) -> Iterator[tuple[str, Timing | str]]:
    """Time all providers once, then all again; for each its timing, or the sentence that says why there is none."""
    spin()
    first: dict[str, Round | str] = {name: _round_or_reason(calls) for name, calls in providers.items()}
    for name, calls in providers.items():
        before = first[name]
        yield name, before if isinstance(before, str) else _timing(before, _round_or_reason(calls))


def spin() -> None:
    """Work until the clocks are up: after a pause a GPU is slower for its first hundred milliseconds."""
    a = torch.ones(2048, 2048, dtype=torch.bfloat16, device="cuda")
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < SPIN_S:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Round:
    """One median, of one call."""

    us: float
    captured: bool
    n_replays: int


def time_round(calls: Calls) -> Round:
    """One median over `calls`, as they are or as a graph.

    The rotation keeps the weights of one call out of L2 when the next begins. Calls that cannot be captured in a graph, because
    they ask the device for sizes, are timed eagerly and marked so.
    """
    pass_s = _warm_pass_s(calls)
    if _waits_for_device(calls[0]):
        n_replays = n_replays_for(pass_s)
        return Round(_median_us(lambda: [call() for call in calls], n_replays) / len(calls), False, n_replays)
    graph, _outputs = _captured(calls, 1)
    n_rounds = n_rounds_for(len(calls), 1e-6 * _median_us(graph.replay, 3))
    graph, _outputs = _captured(calls, n_rounds)  # what the graph writes into must live as long as it is replayed
    n_replays = n_replays_for(1e-6 * _median_us(graph.replay, 3))
    return Round(_median_us(graph.replay, n_replays) / (n_rounds * len(calls)), True, n_replays)


def _timing(before: Round, after: Round | str) -> Timing:
    """A second round that fails, for want of memory or because another broke the process, does not take the first's median along."""
    if isinstance(after, str):
        return Timing(before.us, None, before.captured, before.n_replays, after)
    return Timing(before.us, after.us, after.captured, after.n_replays)


def n_replays_for(replay_s: float) -> int:
    """As many as the budget of a median allows."""
    return max(FEWEST_REPLAYS, min(MOST_REPLAYS, int(BUDGET_S / replay_s)))


def n_rounds_for(n_calls: int, pass_s: float) -> int:
    """How often a graph goes through all calls, one of which passes takes `pass_s`."""
    return max(1, min(MOST_CAPTURED // n_calls, math.ceil(GRAPH_S / pass_s)))


def _round_or_reason(calls: Calls) -> Round | str:
    try:
        return time_round(calls)
    except Exception as failure:  # a peer that cannot run here must not end the run
        return first_line(failure)


def _warm_pass_s(calls: Calls) -> float:
    """Seconds of one pass that is warm, or nearly."""
    for _ in range(N_WARMUP):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        pass_s = time.perf_counter() - began_s
        if pass_s > SLOW_PASS_S:
            break
    return pass_s


def _waits_for_device(call: Callable[[], Any]) -> bool:
    """Whether `call`, which has run before, asks the device for something, which no graph can hold.

    Asked beforehand, because a capture that fails leaves the allocator of a PyTorch without pytorch #180395 believing that it goes
    on: nothing that is timed afterwards can be captured then.
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as failure:
        if "synchronizing CUDA operation" not in str(failure):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


def _captured(calls: Calls, n_rounds: int) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for _ in range(n_rounds) for call in calls]
    return graph, outputs


def _median_us(replay: Callable[[], Any], n_replays: int) -> float:
    times = []
    for _ in range(n_replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)
