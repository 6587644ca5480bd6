"""Preloaded experts in a live run: the same bits, books that balance, and the hits that a replay from the same start finds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from predictors.gate_reuse import GateReuse
from prefetch.accounting import summarise, violations
from prefetch.cache.lfu import Lfu
from prefetch.cache.lru import Lru
from prefetch.cache.none import NoCache
from prefetch.cache.per_layer import PerLayer
from prefetch.cache.replay import replay_hits
from prefetch.cache.resident import Resident
from prefetch.cache.slru import Slru
from prefetch.cache.warm_start import warm_start
from prefetch.errors import TransferError
from prefetch.geometry import ExpertKey
from prefetch.recorder import RunRecord
from prefetch.runtime import OffloadRuntime
from prefetch.transfers.sources import DiskSource
from tests.prefetch.offloaded import PROMPTS, Setting, decode, offloaded

ALL_KEYS = [ExpertKey(layer, expert) for layer in range(3) for expert in range(8)]
HOTTEST_FIRST = random.Random(1).sample(ALL_KEYS, len(ALL_KEYS))
SETTINGS: dict[str, Callable[[], Setting]] = {
    "lru": lambda: Setting(Lru(6)),
    "lfu": lambda: Setting(Lfu(6)),
    "slru": lambda: Setting(),
    "per layer": lambda: Setting(PerLayer(6, 3, Slru)),
    "resident": lambda: Setting(Resident(24), n_slots=24, staging=0, transient=0),
    "no cache": lambda: Setting(NoCache(0), staging=0, transient=10),
    "gate reuse": lambda: Setting(predictor=GateReuse()),
    "policy admits": lambda: Setting(Slru(8), predictor=GateReuse(), policy_admits=True),
    "reserved": lambda: Setting(Slru(8, variant="reserved"), predictor=GateReuse(), policy_admits=True),
}


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def cold_logits(tiny_qwen3: Path, pack_dir: Path) -> torch.Tensor:
    with offloaded(tiny_qwen3, pack_dir, Setting()) as (model, _):
        return decode(model, PROMPTS[:2], new_tokens=12)[1]


def finished(runtime: OffloadRuntime) -> RunRecord:
    runtime.finish()
    return runtime.record()


@pytest.mark.parametrize("name", SETTINGS)
def test_bits_and_books_hold_from_a_warm_start(name: str, tiny_qwen3: Path, pack_dir: Path, cold_logits: torch.Tensor) -> None:
    with offloaded(tiny_qwen3, pack_dir, SETTINGS[name]()) as (model, runtime):
        runtime.tier.preload(HOTTEST_FIRST)
        members, row_bytes = list(runtime.tier.policy), runtime.geometry.expert.row_bytes
        _, logits = decode(model, PROMPTS[:2], new_tokens=12)
        record = finished(runtime)
        assert runtime.tier.pool.n_free + len(runtime.tier.slots) == runtime.tier.pool.n_slots
    assert torch.equal(logits, cold_logits)
    moved = record.transfers
    assert violations(record, moved_bytes=int(moved["moved_bytes"].sum())) == []
    preloads = moved[moved["kind"] == "preload"]
    assert set(zip(preloads["layer"], preloads["expert"], strict=True)) == {tuple(key) for key in members}
    assert (preloads["finished_s"] < 0).all() and (preloads["sequence"] == -1).all()
    assert summarise(record)["preload_bytes"] == len(members) * row_bytes


@pytest.mark.parametrize("name", ["lru", "lfu", "slru", "per layer", "resident"])
def test_a_replay_from_the_same_start_has_the_same_hits(name: str, tiny_qwen3: Path, pack_dir: Path) -> None:
    with offloaded(tiny_qwen3, pack_dir, SETTINGS[name]()) as (model, runtime):
        runtime.tier.preload(HOTTEST_FIRST)
        decode(model)
        record, events = finished(runtime), runtime.recorder.trace({}).routing_events()
    fresh = Slru(6) if name == "slru" else SETTINGS[name]().policy
    assert fresh is not None
    warm_start(fresh, HOTTEST_FIRST)
    counts = replay_hits(fresh, events)
    assert counts.hits_per_layer.tolist() == record.calls.groupby("layer")["hits"].sum().tolist()
    assert list(fresh) == list(runtime.tier.policy)


def test_figures_per_token_leave_preloads_out(tiny_qwen3: Path, pack_dir: Path) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting()) as (model, runtime):
        runtime.tier.preload(HOTTEST_FIRST)
        decode(model, PROMPTS[:1])
        record = finished(runtime)
    without = RunRecord(record.calls, record.forwards, record.transfers[record.transfers["kind"] != "preload"])
    with_them, alone = summarise(record, link_bytes_per_s=1e9), summarise(without, link_bytes_per_s=1e9)
    assert with_them.pop("preload_bytes") > 0 and alone.pop("preload_bytes") == 0
    pd.testing.assert_series_equal(pd.Series(with_them), pd.Series(alone))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("submitted_s", 0.5, "a preload after the first forward pass had begun"),
        ("expert", 0, "an expert preloaded twice"),
        ("moved_bytes", 5, "did not move all of its bytes"),
    ],
)
def test_preloads_that_break_the_books_are_caught(
    column: str, value: float, message: str, tiny_qwen3: Path, pack_dir: Path
) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting(Lru(6))) as (model, runtime):
        runtime.tier.preload([ExpertKey(1, expert) for expert in range(6)])
        decode(model, PROMPTS[:1], new_tokens=4)
        record = finished(runtime)
    assert violations(record) == []
    wrong = record.transfers.index[(record.transfers["kind"] == "preload") & (record.transfers["expert"] == 3)]
    record.transfers.loc[wrong, column] = value
    assert any(message in violation for violation in violations(record))


def test_an_expert_that_cannot_be_read_is_named(tiny_qwen3: Path, pack_dir: Path) -> None:
    class _Unreadable(DiskSource):
        def __init__(self, path, offset_of, row_bytes):  # type: ignore[no-untyped-def]
            """Rows of layer 1 are looked for where no file can be: EINVAL."""
            super().__init__(path, lambda key: -1 if key.layer == 1 else offset_of(key), row_bytes)

    with offloaded(tiny_qwen3, pack_dir, Setting(source=_Unreadable)) as (_, runtime):
        with pytest.raises(TransferError, match="of MoE layer 1 could not be preloaded.*Invalid argument"):
            runtime.tier.preload(HOTTEST_FIRST)
