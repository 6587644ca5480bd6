"""The routing trace: written and read back bit for bit, refused when damaged, and replayed as the runtime routed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from prefetch.dispatch import dispatch
from prefetch.errors import TraceError
from prefetch.geometry import ExpertKey
from prefetch.trace import RoutingTrace
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, PROMPT, TOP_K, make_run

ARRAYS = ["sequence", "step", "phase", "token_ids", "topk_ids", "topk_weights"]


def make_trace() -> RoutingTrace:
    """Two sequences with guesses at lookaheads 1 and 3."""
    trace = make_run().trace
    random = np.random.default_rng(0)
    n = trace.n_tokens
    return dataclasses.replace(
        trace,
        guesses={d: random.integers(-1, N_EXPERTS, (n, N_LAYERS, 4)).astype(np.int16) for d in (1, 3)},
        resident={d: random.random((n, N_LAYERS, N_EXPERTS)) < 0.5 for d in (1, 3)},
        metadata={"model": "tiny — random", "predictor": "none"},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "routing.safetensors"
    make_trace().save(path)
    return path


def rewrite(path: Path, changed: dict[str, np.ndarray], header: dict[str, str], drop: str = "") -> None:
    """Change arrays or header entries of a saved trace."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() | header
    arrays = load_file(path) | changed
    arrays.pop(drop, None)
    save_file(arrays, path, metadata)


def test_what_is_saved_is_what_is_loaded(saved: Path) -> None:
    trace, loaded = make_trace(), RoutingTrace.load(saved)
    for name in ARRAYS:
        assert getattr(loaded, name).dtype == getattr(trace, name).dtype
        np.testing.assert_array_equal(getattr(loaded, name), getattr(trace, name))
    for name in ("guesses", "resident"):
        assert getattr(loaded, name).keys() == getattr(trace, name).keys() == {1, 3}
        for d in (1, 3):
            np.testing.assert_array_equal(getattr(loaded, name)[d], getattr(trace, name)[d])
    assert (loaded.n_experts, loaded.metadata) == (trace.n_experts, trace.metadata)
    assert (loaded.n_tokens, loaded.n_layers, loaded.top_k) == (len(trace.token_ids), N_LAYERS, TOP_K)


def test_arrays_that_are_views_are_saved_in_order(tmp_path: Path) -> None:
    trace = make_trace()
    transposed = np.asfortranarray(trace.topk_ids)
    assert not transposed.flags.c_contiguous
    dataclasses.replace(trace, topk_ids=transposed).save(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(RoutingTrace.load(tmp_path / "t.safetensors").topk_ids, trace.topk_ids)


def test_the_file_reads_without_this_project(saved: Path) -> None:
    assert {"topk_ids", "guesses.1", "resident.3"} <= load_file(saved).keys()


def test_routing_events_are_what_the_runtime_dispatches() -> None:
    run = make_run()
    expected = [[ExpertKey(view.layer, e) for e in dispatch(view.topk_ids).experts] for view in run.views]
    assert run.trace.routing_events() == expected


def test_forwards_cover_every_row_once() -> None:
    run = make_run()
    forwards = run.trace.forwards()
    assert [(f.sequence, f.step) for f in forwards] == list(dict.fromkeys((v.sequence, v.step) for v in run.views))
    rows = np.concatenate([np.arange(run.trace.n_tokens)[f.rows] for f in forwards])
    assert rows.tolist() == list(range(run.trace.n_tokens))
    assert forwards[0].rows == slice(0, PROMPT)


def test_sequences_of_one_forward_pass_each_are_told_apart() -> None:
    trace = make_run().trace
    prefills = dataclasses.replace(
        trace, **{name: getattr(trace, name)[trace.step == 0] for name in ARRAYS}, guesses={}, resident={}
    )
    assert [(f.sequence, f.step, f.rows.stop - f.rows.start) for f in prefills.forwards()] == [
        (0, 0, PROMPT),
        (1, 0, PROMPT),
    ]


def test_an_empty_run_has_no_forwards_and_no_events() -> None:
    trace = make_run().trace
    nothing = dataclasses.replace(trace, **{name: getattr(trace, name)[:0] for name in ARRAYS}, guesses={}, resident={})
    assert nothing.forwards() == []
    assert nothing.routing_events() == []


def test_who_is_reading_the_old_file_can_finish(saved: Path) -> None:
    before = saved.read_bytes()
    with saved.open("rb") as reader:
        dataclasses.replace(make_trace(), metadata={"model": "another"}).save(saved)
        assert reader.read() == before
    assert RoutingTrace.load(saved).metadata == {"model": "another"}


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        make_trace().save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere\.safetensors: no such routing trace"):
        RoutingTrace.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved: Path, kept_bytes: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept_bytes])
    with pytest.raises(TraceError, match=r"routing\.safetensors: the routing trace is truncated or damaged"):
        RoutingTrace.load(saved)


@pytest.mark.parametrize("header", [{"format": "gatecast routing trace, version 99"}, {"format": ""}])
def test_another_format_or_version_is_refused(saved: Path, header: dict[str, str]) -> None:
    rewrite(saved, {}, header)
    with pytest.raises(TraceError, match=r"routing\.safetensors: its format is '.*'; this version reads '.*version 1'"):
        RoutingTrace.load(saved)


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(TraceError, match="its format is None"):
        RoutingTrace.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ARRAYS)
def test_a_missing_array_is_named(saved: Path, name: str) -> None:
    rewrite(saved, {}, {}, drop=name)
    with pytest.raises(TraceError, match=f"the routing trace lacks '{name}'"):
        RoutingTrace.load(saved)


N = make_run().trace.n_tokens
IDS = np.zeros((N, N_LAYERS, TOP_K), np.uint16)
GUESSES = np.zeros((N, N_LAYERS, 4), np.int16)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"topk_ids": IDS[0]}, r"topk_ids has shape \(4, 2\)"),
        ({"topk_ids": IDS[1:]}, "sequence is int32"),
        ({"topk_ids": IDS.astype(np.int64)}, "topk_ids is int64 .* expected uint16"),
        ({"topk_ids": IDS + N_EXPERTS}, "topk_ids names expert 8, but there are 8"),
        ({"topk_weights": np.full(IDS.shape, np.nan, np.float32)}, "topk_weights are not finite"),
        ({"topk_weights": np.zeros((N, N_LAYERS, 1), np.float32)}, r"topk_weights is float32 .* expected float32"),
        ({"token_ids": np.zeros(N - 1, np.int32)}, "token_ids is int32"),
        ({"phase": np.ones(N, np.uint8)}, r"step 0 must be phase 0"),
        ({"sequence": np.arange(N, 0, -1, dtype=np.int32)}, "not in order"),
        ({"guesses.1": GUESSES[1:]}, r"guesses\.1 is int16"),
        ({"guesses.1": GUESSES[0]}, r"guesses\.1 is int16"),
        ({"guesses.1": GUESSES + N_EXPERTS}, r"guesses\.1 names experts from 8 to 8"),
        ({"guesses.1": GUESSES - 2}, r"guesses\.1 names experts from -2 to -2"),
        ({"guesses.2": GUESSES}, r"guesses for lookaheads \[1, 2, 3\] but residency for \[1, 3\]"),
        ({"guesses.x": GUESSES}, "invalid literal"),
        ({"resident.1": np.zeros((N, N_LAYERS, N_EXPERTS - 1), bool)}, r"resident\.1 is bool"),
        ({"resident.1": np.zeros((N, N_LAYERS, N_EXPERTS), np.uint8)}, r"resident\.1 is uint8 .* expected bool"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(saved: Path, changed: dict[str, np.ndarray], problem: str) -> None:
    rewrite(saved, changed, {})
    with pytest.raises(TraceError, match=rf"routing\.safetensors: .*{problem}"):
        RoutingTrace.load(saved)


@pytest.mark.parametrize("header", [{"n_experts": "many"}, {"metadata": "{not json"}])
def test_a_damaged_header_is_refused(saved: Path, header: dict[str, str]) -> None:
    rewrite(saved, {}, header)
    with pytest.raises(TraceError, match=r"routing\.safetensors: "):
        RoutingTrace.load(saved)
