"""How a GPU kernel is timed: CUDA-graph replay over rotating weights, medians, twice."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

N_REPLAYS = 100
N_WARMUP = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: two medians, each over `N_REPLAYS` replays. Their gap is the spread to believe in."""

    first_us: float
    second_us: float
    captured: bool  # by a CUDA graph; otherwise launches from Python are in the time

    @property
    def us(self) -> float:
        return min(self.first_us, self.second_us)


def time_calls(calls: Sequence[Callable[[], Any]]) -> Timing:
    """Time `calls`, which do the same work on different weights, one after the other; per call.

    The rotation keeps the weights of one call out of L2 when the next begins. Calls that cannot be captured in a graph, because
    they ask the device for sizes, are timed eagerly and marked so.
    """
    for _ in range(N_WARMUP):
        for call in calls:
            call()
    torch.cuda.synchronize()
    eager = _waits_for_device(calls[0])
    replay, captured = (lambda: [call() for call in calls], False) if eager else (_captured(calls), True)
    first, second = (_median_us(replay) / len(calls) for _ in range(2))
    return Timing(first, second, captured)


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


def _captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    return partial(_replay, graph, outputs)


def _replay(graph: torch.cuda.CUDAGraph, outputs: list[Any]) -> None:
    """`outputs` is what the graph writes into: it must live as long as the graph is replayed."""
    graph.replay()


def _median_us(replay: Callable[[], Any]) -> float:
    times = []
    for _ in range(N_REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)
