"""The replay: times worked out by hand, books that balance, and the cache's history of a live run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictors.base import LayerView, Prediction, Predictor
from predictors.none import NoPredictor
from predictors.oracle import Oracle
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from prefetch.accounting import summarise, violations
from prefetch.cache.base import CachePolicy
from prefetch.cache.fewest_loads import fewest_loads
from prefetch.cache.lfu import Lfu
from prefetch.cache.lru import Lru
from prefetch.cache.none import NoCache
from prefetch.cache.per_layer import PerLayer
from prefetch.cache.replay import replay_hits
from prefetch.cache.resident import Resident
from prefetch.cache.slru import Slru
from prefetch.clock import VirtualClock
from prefetch.compute.timed_experts import TimedExperts
from prefetch.costs import Costs
from prefetch.errors import ConfigError, PredictorError
from prefetch.fast_tier import FastTier
from prefetch.planner.base import Planner
from prefetch.planner.cpu_fallback import CpuFallback
from prefetch.planner.top_m import TopM
from prefetch.recorder import RunRecord
from prefetch.replay import TimedPredictor, check_replayable, geometry_of, no_reading, replay
from prefetch.runtime import OffloadRuntime
from prefetch.slot_books import SlotBooks
from prefetch.trace import RoutingTrace
from prefetch.transfers.virtual import VirtualTransfers
from tests.prefetch.offloaded import Setting, decode, offloaded

ROW_BYTES = 1000
COSTS = Costs(dense_s=1e-3, call_s=1e-4, expert_s=2e-4, load_s=1e-5, predictor_s=5e-5, in_place_s=7e-4)


@dataclass
class Scene:
    """One replay."""

    trace: RoutingTrace
    policy: CachePolicy
    staging: int = 0
    transient: int = 2
    predictor: Predictor = field(default_factory=NoPredictor)
    planner: Planner = field(default_factory=TopM)
    bytes_per_s: float = 1e6  # a row takes 1 ms
    latency_s: float = 0.0
    chunk_bytes: int = ROW_BYTES
    costs: Costs = COSTS

    @property
    def n_slots(self) -> int:
        return self.policy.capacity + self.staging + self.transient


def replayed(scene: Scene) -> RunRecord:
    geometry, clock = geometry_of(scene.trace, ROW_BYTES), VirtualClock()
    link = {"bytes_per_s": scene.bytes_per_s, "latency_s": scene.latency_s, "chunk_bytes": scene.chunk_bytes}
    transfers = VirtualTransfers(clock, row_bytes=ROW_BYTES, **link)  # type: ignore[arg-type]
    books = SlotBooks(geometry, scene.n_slots)
    tier = FastTier(books, scene.policy, transfers, staging=scene.staging, transient=scene.transient)
    predictor = scene.predictor
    if isinstance(predictor, Oracle):
        predictor.use_trace(scene.trace)
    if not isinstance(predictor, NoPredictor):
        predictor = TimedPredictor(predictor, clock, scene.costs.predictor_s)
    runtime = OffloadRuntime(geometry, tier, predictor, scene.planner, no_reading, TimedExperts(clock, scene.costs), clock)
    replay(runtime, scene.trace, clock, scene.costs)
    return runtime.record()


def trace_of(ids: list, n_experts: int, steps: list[int] | None = None) -> RoutingTrace:
    """One token a forward pass, `ids` [N][L][k]; one sequence, unless `steps` begin anew."""
    topk_ids = np.array(ids, np.uint16)
    step = np.array(range(len(topk_ids)) if steps is None else steps, np.int32)
    sequence = (np.cumsum(step == 0) - 1).astype(np.int32)
    weights = np.full(topk_ids.shape, 0.5, np.float32)
    tokens = np.arange(len(step), dtype=np.int32)
    return RoutingTrace(sequence, step, (step > 0).astype(np.uint8), tokens, topk_ids, weights, n_experts)


def random_trace(seed: int, n_tokens: int = 12, n_layers: int = 3, n_experts: int = 8, top_k: int = 2) -> RoutingTrace:
    random = np.random.default_rng(seed)
    favour = random.random((n_layers, n_experts))
    ids = np.argsort(favour + random.random((n_tokens, n_layers, n_experts)), axis=2)[:, :, -top_k:]
    steps = [*range(n_tokens // 2), *range(n_tokens - n_tokens // 2)]
    return trace_of(ids.tolist(), n_experts, steps)


def decode_s(record: RunRecord) -> list[float]:
    return record.forwards.loc[record.forwards["phase"] == "decode", "wall_s"].tolist()


def test_with_everything_resident_a_token_takes_what_computing_takes() -> None:
    trace = trace_of([[[0, 1], [2, 3]]] * 4, n_experts=4)
    warm = decode_s(replayed(Scene(trace, Resident(8), transient=0)))[1:]
    layer_s = COSTS.dense_s + COSTS.call_s + 2 * COSTS.expert_s
    assert warm == pytest.approx([2 * layer_s] * 2)


def test_without_a_cache_each_expert_is_computed_while_the_next_one_travels() -> None:
    """Two loads of 1 ms, the second of which covers computing the first: 2 ms and one expert beside dense and call."""
    trace = trace_of([[[0, 1]]] * 3, n_experts=4)
    record = replayed(Scene(trace, NoCache(0)))
    assert decode_s(record) == pytest.approx([COSTS.dense_s + COSTS.call_s + 2e-3 + COSTS.expert_s + COSTS.load_s] * 2)
    stall_s = 2e-3 - COSTS.expert_s - COSTS.load_s  # the first expert is computed meanwhile
    assert record.calls["overhead_s"].tolist() == pytest.approx([COSTS.call_s] * 3)
    assert record.calls["stall_s"].tolist() == pytest.approx([stall_s] * 3)


def test_an_oracle_hides_a_load_behind_the_layer_before() -> None:
    """Layer 1's only expert, 1 ms on the link, is asked for while layer 0 computes, 1.2 ms before its router fires."""
    trace = trace_of([[[step % 4], [step % 4]] for step in range(8)], n_experts=4)
    scene = Scene(trace, PerLayer(2, 2, Lru), staging=2, transient=1, predictor=Oracle(lookahead=1))
    record = replayed(scene)
    layer_s = COSTS.dense_s + COSTS.call_s + COSTS.expert_s + COSTS.predictor_s
    assert decode_s(record)[:-1] == pytest.approx([2 * layer_s] * 6)
    assert summarise(record)["stall_share"] == pytest.approx(0.0, abs=1e-9)


def test_where_the_link_is_slower_than_computing_an_oracle_keeps_it_busy() -> None:
    """Loads of 3 ms, one a layer that computes for 1.35 ms: each prefetch is late, and the link never idle."""
    trace = trace_of([[[step % 4], [step % 4]] for step in range(8)], n_experts=4)
    policy = PerLayer(2, 2, Lru)
    scene = Scene(trace, policy, staging=2, transient=1, predictor=Oracle(lookahead=1), bytes_per_s=ROW_BYTES / 3e-3)
    record = replayed(scene)
    assert decode_s(record)[1:-1] == pytest.approx([6e-3] * 5)
    assert record.calls.loc[record.calls["phase"] == "decode", "late"].mean() > 0.9


def test_misses_left_in_place_move_nothing_and_take_the_cpus_time() -> None:
    trace = trace_of([[[0, 1]]] * 3, n_experts=4)
    record = replayed(Scene(trace, Lru(1), planner=CpuFallback(TopM())))
    assert len(record.transfers) == 0
    assert decode_s(record) == pytest.approx([COSTS.dense_s + COSTS.call_s + 2 * COSTS.in_place_s] * 2)  # type: ignore[operator]


def test_an_unknown_cpu_is_refused() -> None:
    unknown = Costs(1e-3, 0.0, 1e-4, 0.0, 0.0, None)
    with pytest.raises(ConfigError, match="machine.in_place_bytes_per_s"):
        replayed(Scene(trace_of([[[0]]] * 2, 4), Lru(1), planner=CpuFallback(TopM()), costs=unknown))


def test_predictors_that_read_states_are_refused() -> None:
    from predictors.gate_reuse import GateReuse

    check_replayable(Popularity())
    with pytest.raises(PredictorError, match="gate_reuse reads hidden states.*predictor=recorded"):
        check_replayable(GateReuse())


class BothSides(Predictor):
    """Is asked before and after the attention, and has nothing to say."""

    before_attention = True

    def predict(self, seen: LayerView) -> list[Prediction]:
        return []


@pytest.mark.parametrize("predictor", [BothSides, PreviousToken])
def test_predicting_takes_its_time_once_a_layer(predictor: Callable[[], Predictor]) -> None:
    """What a run measures of it is the sum of both calls."""
    record = replayed(Scene(random_trace(4), Lru(7), 1, predictor=predictor()))
    assert record.calls["predictor_s"].tolist() == pytest.approx([COSTS.predictor_s] * len(record.calls))


POLICIES: dict[str, Callable[[], CachePolicy]] = {
    "slru": lambda: PerLayer(12, 3, Slru),
    "slru over all": lambda: Slru(9),
    "lru": lambda: Lru(7),
    "lfu": lambda: Lfu(10),
    "none": lambda: NoCache(0),
}
PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "none": NoPredictor,
    "oracle": lambda: Oracle(lookahead=2),
    "poor oracle": lambda: Oracle(accuracy=0.5, lookahead=1),
    "popularity": lambda: Popularity(lookahead=2),
    "previous token": PreviousToken,
}


@given(
    seed=st.integers(0, 1000),
    policy=st.sampled_from(list(POLICIES)),
    predictor=st.sampled_from(list(PREDICTORS)),
    staging=st.integers(1, 5),
    bytes_per_s=st.sampled_from([1e5, 1e6, 3e6, 1e8]),
    latency_s=st.sampled_from([0.0, 1e-4]),
    chunk_bytes=st.sampled_from([300, ROW_BYTES]),
)
@settings(max_examples=60, deadline=None)
def test_books_balance_and_no_arm_beats_the_link(
    seed: int, policy: str, predictor: str, staging: int, bytes_per_s: float, latency_s: float, chunk_bytes: int
) -> None:
    trace = random_trace(seed)
    link = {"bytes_per_s": bytes_per_s, "latency_s": latency_s, "chunk_bytes": chunk_bytes}
    scene = Scene(trace, POLICIES[policy](), staging, predictor=PREDICTORS[predictor](), **link)  # type: ignore[arg-type]
    record = replayed(scene)
    assert violations(record) == []
    load_s = -(-ROW_BYTES // chunk_bytes) * latency_s + ROW_BYTES / bytes_per_s
    assert sum(decode_s(record)) >= fewest_loads(trace, scene.n_slots) * load_s - 1e-9
    assert sum(decode_s(record)) >= computing_s(record) - 1e-9


def computing_s(record: RunRecord) -> float:
    calls = record.calls[record.calls["phase"] == "decode"]
    return len(calls) * (COSTS.dense_s + COSTS.call_s) + int(calls["needed"].sum()) * COSTS.expert_s


@given(seed=st.integers(0, 1000), policy=st.sampled_from(list(POLICIES)))
@settings(max_examples=25, deadline=None)
def test_without_prefetch_hits_are_the_policys(seed: int, policy: str) -> None:
    trace = random_trace(seed)
    record = replayed(Scene(trace, POLICIES[policy]()))
    assert int(record.calls["hits"].sum()) == replay_hits(POLICIES[policy](), trace.routing_events()).hits


def test_a_faster_link_is_never_slower_where_nothing_is_guessed() -> None:
    seconds = [sum(decode_s(replayed(Scene(random_trace(3), Lru(7), bytes_per_s=rate)))) for rate in (1e5, 1e6, 1e7, 1e9)]
    assert seconds == sorted(seconds, reverse=True)


def test_the_trace_of_a_live_run_has_its_cache_history_again(tiny_qwen3: Path, tmp_path: Path) -> None:
    """Hits and misses of every layer call, as they were with real transfers and real experts."""
    setting = Setting()
    with offloaded(tiny_qwen3, tmp_path, setting) as (model, live):
        decode(model)
        live.finish()
        trace, calls = live.recorder.trace({}), live.record().calls
    policy = Slru(setting.n_slots - setting.staging - setting.transient)
    again = replayed(Scene(trace, policy, setting.staging, setting.transient)).calls
    counts = ["sequence", "step", "layer", "n_tokens", "needed", "hits", "late", "misses"]
    pd.testing.assert_frame_equal(again[counts], calls[counts])
    assert trace.row_bytes == live.geometry.expert.row_bytes
