"""The timeline against the documented event format, and against the record it draws."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from experiments.timeline import timeline, write_timeline
from tests.prefetch.synthetic_record import FORWARD_S, N_LAYERS, PARTS_S, PREFILL_S, make_record

US = 1e6
PHASE_NAMES = {"dense", "stall", "expert compute", "predictor", "overhead"}


@pytest.fixture
def trace(tmp_path: Path) -> dict[str, Any]:
    """A whole record, written and read back."""
    path = tmp_path / "timeline.json"
    write_timeline(make_record(), path)
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def slices(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def track_names(trace: dict[str, Any]) -> dict[tuple[int, int], str]:
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}


def test_events_are_those_of_the_documented_format(trace: dict[str, Any]) -> None:
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert isinstance(event["pid"], int)
        if event["ph"] == "X":
            assert isinstance(event["tid"], int)
            assert event["dur"] >= 0
            assert (event["pid"], event["tid"]) in track_names(trace)


def test_slices_of_a_track_do_not_overlap(trace: dict[str, Any]) -> None:
    tracks = defaultdict(list)
    for event in slices(trace):
        tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(tracks) >= 3 + 2  # three of compute, and prefetches overlap each other
    for spans in tracks.values():
        spans.sort()
        for (_, end), (start, _) in pairwise(spans):
            assert start >= end - 1e-6  # a float's rounding of whole nanoseconds


def test_phases_fill_every_forward_pass_exactly(trace: dict[str, Any]) -> None:
    names = track_names(trace)
    phases = [e for e in slices(trace) if names[e["pid"], e["tid"]] == "phases"]
    assert {e["name"] for e in phases} == PHASE_NAMES
    forwards = [e for e in slices(trace) if names[e["pid"], e["tid"]] == "forward passes"]
    assert [e["dur"] for e in forwards] == pytest.approx(([PREFILL_S * US] + [FORWARD_S * US] * 4) * 2)
    for forward in forwards:
        begin, end = forward["ts"] - 1e-3, forward["ts"] + forward["dur"] + 1e-3
        inside = [e for e in phases if begin <= e["ts"] and e["ts"] + e["dur"] <= end]
        assert sum(e["dur"] for e in inside) == pytest.approx(forward["dur"])
        stall_us = sum(e["dur"] for e in inside if e["name"] == "stall")
        assert stall_us == pytest.approx(N_LAYERS * PARTS_S["stall_s"] * US)


def test_every_transfer_that_ran_is_drawn_with_its_key_bytes_and_outcome(trace: dict[str, Any]) -> None:
    names = track_names(trace)
    drawn = [e for e in slices(trace) if names[e["pid"], e["tid"]].startswith("lane")]
    ran = make_record().transfers.dropna(subset=["started_s"])
    assert len(drawn) == len(ran) == 150
    assert sum(e["args"]["bytes"] for e in drawn) == ran["moved_bytes"].sum()
    assert {e["name"] for e in drawn} == {"demand", *(f"prefetch, {o}" for o in ("useful", "late", "wasted", "cancelled"))}
    assert {e["args"]["key"] for e in drawn} == {f"layer {la} expert {ex}" for la in range(N_LAYERS) for ex in range(5)}


def test_size_is_bounded_and_the_trace_says_what_it_shows() -> None:
    whole, part = timeline(make_record(n_decoded=20), n_forwards=100), timeline(make_record(n_decoded=20), 3, 5)
    assert part["otherData"]["drawn"] == "forward passes 3 to 7 of 42"
    assert len(part["traceEvents"]) < len(whole["traceEvents"]) / 4
    names = track_names(part)
    assert [e["name"] for e in slices(part) if names[e["pid"], e["tid"]] == "forward passes"] == [
        f"decode 0.{i}" for i in range(3, 8)
    ]
    assert sum(names[e["pid"], e["tid"]] == "MoE layers" for e in slices(part)) == 5 * N_LAYERS
    assert min(e["ts"] for e in slices(part) if e["pid"] == 1) == 0.0


def test_nothing_to_draw_is_a_valid_empty_trace() -> None:
    assert slices(timeline(make_record(), first_forward=99)) == []
