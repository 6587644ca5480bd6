"""The records of a device-driven run, beside those of a host-driven one, a replay of its routing and the planner's own counters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from predictors.evaluation import OVERALL, count_guesses, quality
from predictors.gate_reuse import GateReuse
from predictors.none import NoPredictor
from prefetch.accounting import summarise, violations
from prefetch.cache.lru import Lru
from prefetch.cache.replay import replay_hits
from prefetch.device_recording import RecordedDeviceRuntime
from prefetch.errors import TransferError
from prefetch.geometry import ExpertKey
from tests.prefetch.offloaded import PROMPTS, Setting, decode, offloaded, plain
from tests.prefetch.test_device_runtime import device_driven

NEW_TOKENS, CAPACITY = 4, 8


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module", params=[None, 2], ids=["no predictor", "gate reuse, two ahead"])
def lookahead(request: pytest.FixtureRequest) -> int | None:
    return request.param


@pytest.fixture(scope="module")
def finished(lookahead: int | None, tiny_qwen3: Path, pack_dir: Path) -> RecordedDeviceRuntime:
    """After all prompts, whose tokens were those of the unmodified model."""
    predictor = GateReuse(lookahead=lookahead) if lookahead else NoPredictor()
    with device_driven(tiny_qwen3, pack_dir, predictor, runtime_class=RecordedDeviceRuntime, capacity=CAPACITY) as (
        model,
        runtime,
    ):
        tokens, _ = decode(model, PROMPTS[:2], NEW_TOKENS)
        runtime.finish()
    assert torch.equal(tokens, decode(plain(tiny_qwen3), PROMPTS[:2], NEW_TOKENS)[0])
    return runtime


def test_the_books_balance(finished: RecordedDeviceRuntime) -> None:
    record = finished.record()
    moved_bytes = (finished.counts()["misses"] + finished.counts()["prefetches"]) * finished.geometry.expert.row_bytes
    assert violations(record, moved_bytes=moved_bytes) == []
    decoded = record.calls[record.calls["phase"] == "decode"]
    assert decoded["hits"].sum() == finished.counts()["hits"] + finished.counts()["useful"]
    assert (record.calls[record.calls["phase"] == "prefill"]["in_place"] > 0).all() and not decoded["in_place"].any()


def test_the_routing_is_that_of_a_host_driven_run(finished: RecordedDeviceRuntime, tiny_qwen3: Path, pack_dir: Path) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting()) as (model, host_driven):
        decode(model, PROMPTS[:2], NEW_TOKENS)
        expected = host_driven.recorder.trace({})
    found = finished.recorder.trace({})
    for name in ("sequence", "step", "phase", "token_ids", "topk_ids"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    np.testing.assert_allclose(found.topk_weights, expected.topk_weights, rtol=1e-4)


def test_guesses_are_as_good_as_the_same_predictors_on_the_host(
    finished: RecordedDeviceRuntime, lookahead: int | None, tiny_qwen3: Path, pack_dir: Path
) -> None:
    found = finished.recorder.trace({})
    if lookahead is None:
        assert not found.guesses
        return
    with offloaded(tiny_qwen3, pack_dir, Setting(predictor=GateReuse(lookahead=lookahead))) as (model, host_driven):
        decode(model, PROMPTS[:2], NEW_TOKENS)
        expected = host_driven.recorder.trace({})
    figures = ["lookahead", "recall", "weight_mass"]
    ours, theirs = (quality(count_guesses(trace), OVERALL).query("phase == 'decode'")[figures] for trace in (found, expected))
    np.testing.assert_allclose(ours.to_numpy(float), theirs.to_numpy(float), rtol=1e-4)


def test_hits_without_prefetches_are_those_of_a_replay(finished: RecordedDeviceRuntime, lookahead: int | None) -> None:
    if lookahead is not None:
        assert finished.counts()["prefetches"] > 0
        return
    trace = finished.recorder.trace({})
    events = [
        [ExpertKey(layer, expert) for expert in token[layer].tolist()]
        for token in trace.topk_ids[trace.step > 0]
        for layer in range(trace.n_layers)
    ]
    assert finished.counts()["hits"] == replay_hits(Lru(CAPACITY), events).hits > 0


def test_figures_are_known_but_for_times_inside_a_forward_pass(finished: RecordedDeviceRuntime) -> None:
    found = summarise(finished.record(), link_bytes_per_s=1e9)
    assert found["tokens_per_s"] > 0 and found["hit_rate"] > 0 and found["demand_bytes_per_token"] > 0
    assert all(np.isnan(found[f"{part}_share"]) for part in ("stall", "expert", "predictor", "overhead", "dense", "transfer"))


def test_books_that_do_not_balance_are_noticed(tiny_qwen3: Path, pack_dir: Path) -> None:
    with device_driven(tiny_qwen3, pack_dir, NoPredictor(), runtime_class=RecordedDeviceRuntime) as (model, runtime):
        decode(model, PROMPTS[:1], 2)
        runtime.copies.pop()
        with pytest.raises(TransferError, match="books do not balance.*misses"):
            runtime.finish()
