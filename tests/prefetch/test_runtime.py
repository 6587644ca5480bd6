"""The runtime against unmodified transformers, against itself with other parts, and against its own books."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from predictors.base import LayerView, Prediction, Predictor
from predictors.evaluation import count_guesses, quality
from predictors.gate_reuse import GateReuse
from predictors.oracle import Oracle
from predictors.popularity import Popularity
from predictors.previous_token import PreviousToken
from prefetch.accounting import violations
from prefetch.cache.lfu import Lfu
from prefetch.cache.lru import Lru
from prefetch.cache.none import NoCache
from prefetch.cache.replay import replay_hits
from prefetch.cache.resident import Resident
from prefetch.cache.slru import Slru
from prefetch.compute.base import LayerCompute
from prefetch.errors import CapacityError, RoutingError, TransferError
from prefetch.fast_tier import FastTier
from prefetch.geometry import PAGE_BYTES, ExpertGeometry, ExpertKey, MoEGeometry
from prefetch.planner.cpu_fallback import CpuFallback
from prefetch.planner.top_m import TopM
from prefetch.slots import SlotPool
from prefetch.transfers.sources import DiskSource, HostSource
from prefetch.transfers.threads import ThreadTransfers
from tests.prefetch.offloaded import PROMPTS, Setting, decode, offloaded, plain
from tests.prefetch.transfers.gated_source import GatedSource

SETTINGS: dict[str, Callable[[], Setting]] = {
    "resident": lambda: Setting(Resident(24), n_slots=24, staging=0, transient=0),
    "slru": lambda: Setting(),
    "lru": lambda: Setting(Lru(6)),
    "lfu": lambda: Setting(Lfu(6)),
    "no cache": lambda: Setting(NoCache(0), staging=0, transient=10),
    "two transients": lambda: Setting(NoCache(0), n_slots=2, staging=0, transient=2),
    "host tier": lambda: Setting(source=HostSource, predictor=GateReuse()),
    "gate reuse": lambda: Setting(predictor=GateReuse()),
    "gate reuse, two ahead": lambda: Setting(predictor=GateReuse(lookahead=2)),
    "popularity": lambda: Setting(predictor=Popularity()),
    "previous token": lambda: Setting(predictor=PreviousToken(lookahead=2)),
    "many guesses": lambda: Setting(predictor=GateReuse(), planner=TopM(extra=4), staging=6, n_slots=14),
    "cpu": lambda: Setting(planner=CpuFallback(TopM(), link_experts=0)),
    "cpu when busy": lambda: Setting(predictor=GateReuse(), planner=CpuFallback(TopM(), link_experts=1)),
    "policy admits": lambda: Setting(Slru(8), predictor=GateReuse(), policy_admits=True),
    "promote": lambda: Setting(Slru(8, variant="promote_on_prefetch"), predictor=GateReuse(), policy_admits=True),
    "reserved": lambda: Setting(Slru(8, variant="reserved"), predictor=GateReuse(), policy_admits=True),
}


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def resident_logits(tiny_qwen3: Path, pack_dir: Path) -> torch.Tensor:
    with offloaded(tiny_qwen3, pack_dir, SETTINGS["resident"]()) as (model, _):
        return decode(model)[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_have_the_same_bits_whatever_the_parts(
    name: str, tiny_qwen3: Path, pack_dir: Path, resident_logits: torch.Tensor
) -> None:
    with offloaded(tiny_qwen3, pack_dir, SETTINGS[name]()) as (model, runtime):
        _, logits = decode(model)
        runtime.finish()
        record = runtime.record()
    assert torch.equal(logits, resident_logits)
    assert violations(record) == []
    assert runtime.tier.pool.n_free + len(runtime.tier.slots) == runtime.tier.pool.n_slots


@pytest.mark.parametrize("checkpoint", ["tiny_qwen3", "tiny_mixtral"])
def test_tokens_equal_unmodified_transformers(checkpoint: str, pack_dir: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(checkpoint)
    expected_tokens, expected_logits = decode(plain(folder))
    with offloaded(folder, pack_dir, Setting(n_slots=6, predictor=GateReuse())) as (model, _):
        tokens, logits = decode(model)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)


def test_batches_decode_like_transformers(tiny_qwen3: Path, pack_dir: Path) -> None:
    batch = [torch.cat(PROMPTS)]
    expected_tokens, _ = decode(plain(tiny_qwen3), batch)
    with offloaded(tiny_qwen3, pack_dir, Setting(predictor=GateReuse())) as (model, runtime):
        tokens, _ = decode(model, batch)
        runtime.finish()
        record = runtime.record()
    assert torch.equal(tokens, expected_tokens)
    assert violations(record) == []
    assert set(record.forwards["n_tokens"]) == {3 * 12, 3}


def test_nothing_is_predicted_once_every_expert_is_on_board(tiny_qwen3: Path, pack_dir: Path) -> None:
    setting = Setting(Resident(24), n_slots=26, staging=2, transient=0, predictor=GateReuse())
    with offloaded(tiny_qwen3, pack_dir, setting) as (model, runtime):
        decode(model)
        with torch.inference_mode():
            model(torch.arange(64).repeat(1, 4))  # enough tokens to need every expert
        assert runtime.tier.holds_everything
        n_guesses = len(runtime.recorder.guesses)
        decode(model)
        assert n_guesses > 0 and len(runtime.recorder.guesses) == n_guesses


def test_prefetches_that_are_only_considered_move_nothing_and_are_judged(tiny_qwen3: Path, pack_dir: Path) -> None:
    planner = TopM(min_useful_share=1.0)
    with offloaded(tiny_qwen3, pack_dir, Setting(predictor=GateReuse(), planner=planner)) as (model, runtime):
        runtime.tier.useful_share = 0.0  # as if all before had been wasted: 1 is never reached again
        decode(model)
        runtime.finish()
        trace, record = runtime.recorder.trace({}), runtime.record()
    assert set(record.transfers["outcome"]) == {"demand"}
    recall = quality(count_guesses(trace)).set_index("phase").loc["decode", "recall"]
    assert 0 < runtime.tier.useful_share < 1 and recall < 1, "some guesses were right, some wrong"


def test_works_with_transformers_generate(tiny_qwen3: Path, pack_dir: Path) -> None:
    options = {"max_new_tokens": 10, "do_sample": False}
    expected = plain(tiny_qwen3).generate(PROMPTS[0], **options)
    with offloaded(tiny_qwen3, pack_dir, Setting()) as (model, runtime):
        assert torch.equal(model.generate(PROMPTS[0], **options), expected)
        assert runtime.sequence == 0 and runtime.step == 9


def test_no_expert_becomes_a_parameter(tiny_qwen3: Path, pack_dir: Path) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting()) as (model, _):
        assert not [name for name, _ in model.named_parameters() if ".experts." in name]


@pytest.mark.parametrize("name", ["slru", "lru", "lfu", "gate reuse", "previous token"])
def test_cache_history_depends_on_the_routing_alone(name: str, tiny_qwen3: Path, pack_dir: Path) -> None:
    """Replaying the recorded routing through a fresh policy gives the live run's members: no prefetch, no timing leaks in."""
    setting = SETTINGS[name]()
    with offloaded(tiny_qwen3, pack_dir, setting) as (model, runtime):
        decode(model)
        runtime.finish()
        live = list(runtime.tier.policy)
        record = runtime.record()
        events = runtime.recorder.trace({}).routing_events()
    fresh = type(runtime.tier.policy)(runtime.tier.policy.capacity)
    counts = replay_hits(fresh, events)
    assert list(fresh) == live
    if setting.predictor is None:
        assert counts.hits == record.calls["hits"].sum()
    else:
        assert counts.hits <= record.calls["hits"].sum()


def test_oracle_finds_every_expert_it_was_told_of(tiny_qwen3: Path, pack_dir: Path) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting()) as (model, runtime):
        decode(model)
        trace = runtime.recorder.trace({})
    oracle = Oracle(lookahead=1)
    oracle.use_trace(trace)
    with offloaded(tiny_qwen3, pack_dir, Setting(n_slots=14, staging=6, predictor=oracle)) as (model, runtime):
        decode(model)
        runtime.finish()
        record = runtime.record()
        replayed = runtime.recorder.trace({})
    assert np.array_equal(replayed.topk_ids, trace.topk_ids)
    assert "wasted" not in set(record.transfers["outcome"])
    decode_rows = replayed.phase == 1
    guessed = np.sort(replayed.guesses[1][decode_rows][:, :, :2], axis=-1)
    assert np.array_equal(guessed, np.sort(trace.topk_ids[decode_rows].astype(np.int16), axis=-1))


class _Broken(Predictor):
    """Fails in the way it is told, at its fifth call."""

    def __init__(self, how: str):
        self.how, self.n_calls = how, 0

    def predict(self, seen: LayerView) -> list[Prediction]:
        self.n_calls += 1
        if self.n_calls < 5:
            return []
        if self.how == "raises":
            raise RuntimeError("no idea")
        scores = {"NaN": torch.full((1, 8), torch.nan), "shape": torch.zeros(1, 7), "layer": torch.zeros(1, 8)}[self.how]
        return [Prediction(99 if self.how == "layer" else 1, scores)]


@pytest.mark.parametrize("how", ["raises", "NaN", "shape", "layer"])
def test_a_failing_predictor_is_reported_once_and_switched_off(
    how: str, tiny_qwen3: Path, pack_dir: Path, resident_logits: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    broken = _Broken(how)
    with offloaded(tiny_qwen3, pack_dir, Setting(predictor=broken)) as (model, _):
        assert torch.equal(decode(model)[1], resident_logits)
    assert broken.n_calls == 5
    warnings = [r.getMessage() for r in caplog.records if "going on without prefetch" in r.getMessage()]
    assert len(warnings) == 1 and "_Broken" in warnings[0]


class _KeepsPreviousFinal(Predictor):
    """Keeps the state that every layer call of a forward pass was shown, by (sequence, step)."""

    needs_previous_final = True

    def __init__(self) -> None:
        self.shown: dict[tuple[int, int], list[torch.Tensor | None]] = {}

    def predict(self, seen: LayerView) -> list[Prediction]:
        self.shown.setdefault((seen.sequence, seen.step), []).append(seen.previous_final)
        return []


def test_each_sequence_of_a_batch_is_shown_its_own_final_state(tiny_qwen3: Path, pack_dir: Path) -> None:
    """Against plain transformers over the whole batch at once; nothing is shown in a prefill, also the second one."""
    keeps, batch = _KeepsPreviousFinal(), torch.cat(PROMPTS)
    with offloaded(tiny_qwen3, pack_dir, Setting(predictor=keeps)) as (model, _):
        tokens, _ = decode(model, [batch, batch.flip(0)], new_tokens=4)
    for sequence, (prompts, new) in enumerate(zip([batch, batch.flip(0)], tokens.split(len(batch)), strict=True)):
        with torch.no_grad():
            final = plain(tiny_qwen3).model(torch.cat([prompts, new], dim=1)).last_hidden_state
        assert all(state is None for state in keeps.shown[sequence, 0])
        for step in range(1, 4):
            for state in keeps.shown[sequence, step]:
                torch.testing.assert_close(state, final[:, prompts.shape[1] + step - 2], rtol=1e-3, atol=1e-4)


def test_nan_hidden_states_are_named(tiny_qwen3: Path, pack_dir: Path) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting()) as (model, _):
        with torch.no_grad():
            model.model.layers[1].post_attention_layernorm.weight[3] = torch.nan
        with pytest.raises(RoutingError, match="MoE layer 1 .* not finite"):
            decode(model)


def test_an_unreadable_expert_surfaces_at_its_layer_and_leaves_clean_books(tiny_qwen3: Path, tmp_path: Path) -> None:
    class _Unreadable(DiskSource):
        broken = True

        def __init__(self, path, offset_of, row_bytes):  # type: ignore[no-untyped-def]
            """Rows of layer 1 are looked for where no file can be: EINVAL."""
            super().__init__(path, lambda key: -1 if self.broken and key.layer == 1 else offset_of(key), row_bytes)

    with offloaded(tiny_qwen3, tmp_path, Setting(source=_Unreadable, predictor=GateReuse())) as (model, runtime):
        with pytest.raises(TransferError, match="of MoE layer 1 could not be loaded.*Invalid argument"):
            decode(model)
        runtime.recorder.drop_unfinished()
        _Unreadable.broken = False  # the disk is well again: the same runtime goes on
        tokens, _ = decode(model)
        runtime.finish()
        assert runtime.tier.pool.n_free + len(runtime.tier.slots) == runtime.tier.pool.n_slots
    assert torch.equal(tokens, decode(plain(tiny_qwen3))[0])


def interrupt(owner: Any, name: str, after: list[None]) -> None:
    """Ctrl-C instead of the method `name` of `owner`, once `after` is used up; only once."""
    method = getattr(owner, name)

    def interrupted(*arguments: Any) -> Any:
        if after:
            after.pop()
            if not after:
                raise KeyboardInterrupt
        return method(*arguments)

    setattr(owner, name, interrupted)


@pytest.mark.parametrize("where", ["begin", "wait_any", "from_slots"])
@pytest.mark.parametrize("name", ["gate reuse", "policy admits", "no cache", "two transients"])
def test_nothing_stays_on_board_that_had_not_arrived_when_its_call_was_interrupted(
    where: str, name: str, tiny_qwen3: Path, pack_dir: Path, resident_logits: torch.Tensor
) -> None:
    after: list[None] = [None] * 5
    with offloaded(tiny_qwen3, pack_dir, SETTINGS[name]()) as (model, runtime):
        begin, tier = runtime.compute.begin, runtime.tier

        def begun(*arguments: Any) -> LayerCompute:
            call = begin(*arguments)
            if where == "from_slots":
                interrupt(call, where, after)
            return call

        runtime.compute.begin = begun  # type: ignore[method-assign]
        if where != "from_slots":
            interrupt(runtime.compute if where == "begin" else tier.transfers, where, after)
        with pytest.raises(KeyboardInterrupt):
            decode(model)
        arrived = {key: slot for key, slot in tier.slots.items() if key not in tier.staged}
        assert all(tier.pool.slot_of[key] == slot and key in tier.policy for key, slot in arrived.items())
        assert all(key in tier.slots for key in tier.policy)
        runtime.recorder.drop_unfinished()
        assert torch.equal(decode(model)[1], resident_logits)
        runtime.finish()
        assert tier.pool.n_free + len(tier.slots) == tier.pool.n_slots


def test_what_waits_for_a_transients_slot_is_not_prefetched_too() -> None:
    """A guess for the same layer of the next pass, when the slot of a cancelled prefetch has just become free."""
    size = MoEGeometry(1, 8, 2, ExpertGeometry(32, 16, torch.float32))
    pool, source = SlotPool(size, 2), GatedSource(size.expert.row_bytes, lambda key: key.expert == 0)
    cancelled, first, waits = (ExpertKey(0, expert) for expert in range(3))
    with closing(ThreadTransfers(source, pool.buffer, n_threads=1, chunk_bytes=PAGE_BYTES)) as transfers:
        tier = FastTier(pool, NoCache(0), transfers, staging=1, transient=1)
        tier.stage(cancelled, 1, [])
        source.await_reads(1)
        found = tier.look_up(0, [first, waits], lambda absent: [])
        [waiting] = tier.start(found.misses)
        source.open()
        while not tier.prefetch_room:
            time.sleep(0.001)
        tier.stage(waits, 1, [first, waits])
        for demand in found.misses:
            tier.start(found.misses)
            assert demand.record is not None
            while not demand.record.transfer.settled:
                transfers.wait_any([demand.record.transfer])
            tier.arrived(demand)
            tier.release(demand.key)
        tier.finish()
        assert waiting.arrived and pool.n_free == pool.n_slots and not tier.slots


def test_too_few_slots_are_refused(tiny_qwen3: Path, tmp_path: Path) -> None:
    setting = Setting(Slru(6), n_slots=8, staging=2, transient=2)
    with pytest.raises(CapacityError, match="cache.slots must be at least 10"):
        with offloaded(tiny_qwen3, tmp_path, setting):
            pass
