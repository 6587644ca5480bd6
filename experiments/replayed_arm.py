"""One arm of a replay: its trace, machine, cache, predictor and planner, and one run of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.after_warmup import counted_calls, record_after, trace_after
from experiments.arm_parts import build_planner, build_predictor, build_tier, check_books
from experiments.machines.base import Link, Machine
from experiments.slot_budget import slot_budget
from predictors.none import NoPredictor
from prefetch.accounting import summarise
from prefetch.clock import VirtualClock
from prefetch.compute.timed_experts import TimedExperts
from prefetch.costs import Costs
from prefetch.errors import ConfigError, TraceError
from prefetch.geometry import MoEGeometry
from prefetch.recorder import Recorder, RunRecord
from prefetch.replay import TimedPredictor, check_replayable, no_reading, replay
from prefetch.runtime import OffloadRuntime
from prefetch.slot_books import SlotBooks
from prefetch.trace import RoutingTrace
from prefetch.transfers.virtual import VirtualTransfers

NOT_SIMULATED = ("ttft_s", "prefill_")  # prompts go through the caches, but the costs are those of few tokens


@dataclass
class ReplayedArm:
    """One arm's run."""

    record: RunRecord
    recorder: Recorder
    predictor_failed: bool
    costs: Costs
    link: Link
    metadata: dict[str, str]  # of the trace that was replayed

    @cached_property
    def trace(self) -> RoutingTrace:
        """The routing, and what was guessed of it; which experts were on board then is simulated."""
        return self.recorder.trace(self.metadata | {"simulated": "which experts were resident"})

    def figures(self, n_warmup: int) -> dict[str, float]:
        """The headline metrics of decoding, after the first sequences."""
        found = summarise(record_after(self.record, n_warmup), self.link.bytes_per_s)
        return {name: value for name, value in found.items() if not name.startswith(NOT_SIMULATED)}

    def layer_s(self, n_warmup: int) -> float:
        """What one layer of a decoded forward pass takes on average, without stalls and predicting."""
        needed, costs = self._decoded(n_warmup).calls["needed"].mean(), self.costs
        return costs.dense_s + costs.call_s + float(needed) * costs.expert_s

    def overlapped(self, geometry: MoEGeometry, n_warmup: int, n_loads: int | None = None) -> float:
        """Tokens/s if loading were hidden behind computing as far as the link allows: the longer of the two is all that is waited for.

        Args:
            n_loads: experts that are loaded; None: as many as this arm missed and did not compute in place.
        """
        decoded = self._decoded(n_warmup)
        computing_s = len(decoded.calls) * self.layer_s(n_warmup)
        n_loads = int((decoded.calls["misses"] - decoded.calls["in_place"]).sum()) if n_loads is None else n_loads
        loading_s = n_loads * self.link.load_s(geometry.expert.row_bytes)
        return float(decoded.forwards["n_tokens"].sum()) / max(computing_s, loading_s)

    def _decoded(self, n_warmup: int) -> RunRecord:
        counted = record_after(self.record, n_warmup)
        calls, forwards = (table[table["phase"] == "decode"] for table in (counted.calls, counted.forwards))
        return RunRecord(calls, forwards, counted.transfers)


def read_trace(cfg: DictConfig) -> RoutingTrace:
    """The trace to replay, its sequences numbered from 0.

    Raises:
        TraceError: it cannot be read, lacks forward passes, or has too few sequences or decoded tokens.
        ConfigError: `max_sequences` is impossible.
    """
    trace = RoutingTrace.load(Path(cfg.trace))
    trace = dataclasses.replace(trace, sequence=np.unique(trace.sequence, return_inverse=True)[1].astype(np.int32))
    if cfg.max_sequences is not None:
        if cfg.max_sequences < 1:
            raise ConfigError(f"max_sequences={cfg.max_sequences}: it must be at least 1, or null for all")
        trace = trace_after(trace, 0, cfg.max_sequences)
    _check_steps(trace, cfg.trace)
    n_sequences = int(trace.sequence.max(initial=-1)) + 1
    if not any(counted_calls(trace, cfg.warmup_sequences)):
        raise TraceError(
            f"trace={cfg.trace}: no decoded token is left of its {n_sequences} sequences after warmup_sequences={cfg.warmup_sequences}"
        )
    return trace


def _check_steps(trace: RoutingTrace, path: str) -> None:
    """Raise TraceError unless every sequence is whole: its forward passes are counted again as they are replayed."""
    expected = (-1, 0)
    for sequence, step, _ in trace.forwards():
        if (sequence, step) not in (expected, (expected[0] + 1, 0)):
            raise TraceError(
                f"trace={path}: a forward pass is missing before step {step} of sequence {sequence}, counted from 0"
            )
        expected = (sequence, step + 1)


def run_arm(
    name: str, cfg: DictConfig, trace: RoutingTrace, geometry: MoEGeometry, progress: Callable[[], None] = lambda: None
) -> ReplayedArm:
    """Replay `trace` once in the arm `name`, from an empty cache.

    Raises:
        ConfigError, PredictorError, CapacityError, ResultsError: the arm cannot be.
    """
    machine: Machine = instantiate(cfg.machine)
    predictor = build_predictor(cfg, trace)
    check_replayable(predictor)
    predicts = not isinstance(predictor, NoPredictor)
    costs, link = machine.costs(geometry, cfg.shape.dense_bytes, name if predicts else None), machine.the_link()
    clock = VirtualClock()
    budget = slot_budget(cfg, geometry)
    books = SlotBooks(geometry, budget.n_slots)
    transfers = VirtualTransfers(clock, row_bytes=geometry.expert.row_bytes, **dataclasses.asdict(link))
    tier = build_tier(cfg, budget, geometry, books, transfers)
    shown = TimedPredictor(predictor, clock, costs.predictor_s) if predicts else predictor
    runtime = OffloadRuntime(geometry, tier, shown, build_planner(cfg), no_reading, TimedExperts(clock, costs), clock)
    with torch.inference_mode():
        replay(runtime, trace, clock, costs, progress)
    record = runtime.record()
    check_books(name, record)
    failed = predicts and isinstance(runtime.predictor, NoPredictor)
    return ReplayedArm(record, runtime.recorder, failed, costs, link, trace.metadata)


def expert_bytes(cfg: DictConfig, trace: RoutingTrace) -> int:
    """Of one expert, as `cfg.shape` or else the trace says.

    Raises:
        ConfigError: neither does.
    """
    n_bytes = cfg.shape.expert_bytes if cfg.shape.expert_bytes is not None else trace.row_bytes
    if n_bytes is None:
        raise ConfigError(f"trace={cfg.trace} does not say how large an expert is: set shape.expert_bytes, or choose a shape")
    if n_bytes < 1:
        raise ConfigError(f"shape.expert_bytes={n_bytes}: it must be at least 1")
    return int(n_bytes)
