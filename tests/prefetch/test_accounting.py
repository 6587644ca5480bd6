"""Identities that are violated on purpose are caught, and the headline metrics are those of a run made up by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.accounting import TIME_PARTS, decode_step_s, summarise, violations
from prefetch.recorder import RunRecord
from tests.prefetch.synthetic_record import FORWARD_S, GAP_S, N_LAYERS, PARTS_S, PREFILL_S, ROW_BYTES, make_record

N_SEQUENCES, N_DECODED = 2, 4
STEP_S = FORWARD_S + GAP_S
MOVED_BYTES = N_SEQUENCES * (1 + N_DECODED) * N_LAYERS * int(4.5 * ROW_BYTES)
WALL_S = N_SEQUENCES * (PREFILL_S + N_DECODED * STEP_S)


def test_an_honest_record_has_no_violations() -> None:
    assert violations(make_record(), moved_bytes=MOVED_BYTES, wall_s=WALL_S) == []


def _set(table: str, row: int, column: str, value: object) -> Callable[[RunRecord], None]:
    def apply(record: RunRecord) -> None:
        getattr(record, table).loc[row, column] = value

    return apply


def _drop(table: str, row: int) -> Callable[[RunRecord], None]:
    return lambda record: setattr(record, table, getattr(record, table).drop(index=row))


BREAKS = {
    "one more hit than needed": (_set("calls", 5, "hits", 3), "hits + late + misses"),
    "a negative count": (_set("calls", 0, "in_place", -1), "negative count"),
    "more on the CPU than missed": (_set("calls", 4, "in_place", 2), "computed in place than missed"),
    "an expert on the CPU and loaded": (_set("calls", 4, "in_place", 1), "29 misses to be loaded, but 30 demand loads"),
    "a transfer nobody accounted for": (_set("transfers", 3, "outcome", ""), "without a known outcome"),
    "a useful prefetch of half an expert": (_set("transfers", 1, "moved_bytes", 500), "did not move all"),
    "an expert of too many bytes": (_set("transfers", 0, "moved_bytes", 1001), "moved more than its bytes"),
    "a late prefetch counted as a hit": (_set("transfers", 2, "late", False), "30 late experts, but 29 late prefetches"),
    "a miss without a transfer": (_drop("transfers", 0), "but 29 demand loads"),
    "time counted twice": (_set("calls", 7, "stall_s", 0.02), "do not add up"),
    "overhead hidden as negative": (
        lambda r: r.calls.__setitem__(["expert_s", "overhead_s"], r.calls[["expert_s", "overhead_s"]] + [0.004, -0.004]),
        "negative time",
    ),
    "a call longer than its forward pass": (_set("forwards", 2, "wall_s", 0.001), "outside its forward pass"),
    "a call without a forward pass": (_drop("forwards", 3), "outside its forward pass"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_identity_is_caught(name: str) -> None:
    breaks, message = BREAKS[name]
    record = make_record()
    breaks(record)
    found = violations(record)
    assert any(message in line for line in found), found


def test_prefetch_hits_beyond_all_hits_are_caught() -> None:
    record = make_record()
    record.calls[["hits", "misses"]] = [0, 3]
    assert any("30 prefetches used on time, but only 0 hits" in line for line in violations(record))


@pytest.mark.parametrize("moved_bytes", [MOVED_BYTES - 1, MOVED_BYTES + 1, 0])
def test_bytes_that_the_tier_counted_differently_are_caught(moved_bytes: int) -> None:
    (line,) = violations(make_record(), moved_bytes=moved_bytes)
    assert f"add up to {MOVED_BYTES}, but {moved_bytes} were moved" in line


@pytest.mark.parametrize(("factor", "n_lines"), [(0.97, 1), (0.99, 0), (1.01, 0), (1.03, 1)])
def test_wall_time_must_agree_within_the_stated_tolerance(factor: float, n_lines: int) -> None:
    assert len(violations(make_record(), wall_s=WALL_S * factor)) == n_lines


def test_a_violation_names_where_it_happened() -> None:
    record = make_record()
    record.calls.loc[4, "hits"] = 0
    (line,) = violations(record)
    assert "1 of 30 rows, first at sequence 0, step 1, layer 1" in line


def test_headline_metrics_are_those_of_the_decode_phase() -> None:
    got = summarise(make_record(), link_bytes_per_s=1e6)
    n_steps, n_tokens = N_SEQUENCES * N_DECODED, N_SEQUENCES * N_DECODED * 2
    assert got["ttft_s"] == pytest.approx(PREFILL_S)
    assert got["tpot_mean_s"] == pytest.approx(STEP_S)
    assert got["tpot_median_s"] == pytest.approx(STEP_S)
    assert got["tpot_p95_s"] == pytest.approx(STEP_S)
    assert got["n_tokens"] == n_tokens
    assert got["tokens_per_s"] == pytest.approx(2 / STEP_S)  # both sequences of the batch
    for part in ("stall", "expert", "predictor", "overhead"):
        assert got[f"{part}_share"] == pytest.approx(N_LAYERS * PARTS_S[f"{part}_s"] / STEP_S)
    assert sum(got[f"{part}_share"] for part in TIME_PARTS) == pytest.approx(1.0)
    assert (got["hit_rate"], got["late_rate"], got["miss_rate"]) == (0.5, 0.25, 0.25)
    assert got["prefetch_hit_rate"] == 0.25  # half of the hits would not be hits without prefetch
    per_token = n_steps * N_LAYERS * ROW_BYTES / n_tokens
    for outcome, rows in {"demand": 1, "useful": 2, "wasted": 1, "cancelled": 0.5, "failed": 0}.items():
        assert got[f"{outcome}_bytes_per_token"] == pytest.approx(rows * per_token)
    assert got["link_utilisation"] == pytest.approx(n_steps * N_LAYERS * 4.5 * ROW_BYTES / (1e6 * n_steps * STEP_S))


def test_prefill_figures_stand_beside_under_their_own_names() -> None:
    got = summarise(make_record())
    assert got["prefill_n_tokens"] == N_SEQUENCES * 16
    assert got["prefill_tokens_per_s"] == pytest.approx(16 / PREFILL_S)
    assert got["prefill_stall_share"] == pytest.approx(N_LAYERS * PARTS_S["stall_s"] / PREFILL_S)
    assert math.isnan(got["link_utilisation"])  # no rate known: not measured, rather than 0


def test_the_time_between_forward_passes_counts_and_the_time_between_prompts_does_not() -> None:
    assert decode_step_s(make_record().forwards) == pytest.approx([STEP_S] * (N_SEQUENCES * N_DECODED))


def test_a_run_that_decoded_nothing_gives_nan_not_an_error() -> None:
    record = make_record(n_decoded=0)
    got = summarise(record)
    assert violations(record) == []
    assert got["n_tokens"] == 0
    assert math.isnan(got["tpot_median_s"])
    assert math.isnan(got["tokens_per_s"])
    assert got["ttft_s"] == pytest.approx(PREFILL_S)


def test_a_run_without_transfers_is_a_run() -> None:
    record = make_record()
    record.transfers = record.transfers.iloc[:0]
    record.calls[["hits", "late", "misses"]] = [4, 0, 0]
    assert violations(record) == []
    assert summarise(record)["hit_rate"] == 1.0
    assert summarise(record)["demand_bytes_per_token"] == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9), st.booleans()), max_size=12))
def test_the_time_with_a_transfer_under_way_counts_no_moment_twice(intervals: list[tuple[int, int, bool]]) -> None:
    """Against a count of whole milliseconds; a transfer that moved nothing was never under way."""
    record = make_record()
    forwards = record.forwards[record.forwards["phase"] == "decode"].tail(1)
    template = record.transfers.iloc[[0]].assign(step=1, lookahead=0)
    rows = [
        template.assign(started_s=start / 1000, finished_s=(start + length) / 1000, moved_bytes=100 if moved else 0)
        for start, length, moved in intervals
    ]
    transfers = pd.concat(rows) if rows else record.transfers.iloc[:0]
    covered = {ms for start, length, moved in intervals if moved for ms in range(start, start + length)}
    found = summarise(RunRecord(record.calls, forwards, transfers))
    assert found["transfer_share"] * found["wall_s"] == pytest.approx(len(covered) / 1000)
