"""A run as a Chrome trace: open the JSON in https://ui.perfetto.dev or chrome://tracing.

Format: "Trace Event Format" of the Chromium project, JSON object form, complete events (`ph` "X") with `ts` and `dur` in
microseconds, and metadata events (`ph` "M") that name tracks. Two processes: *compute* with the tracks "forward passes", "MoE
layers" and "phases", *transfers* with one track per lane, a lane being a place for transfers that overlap in time.

What is measured and what is drawn: starts and lengths of forward passes, layer calls and transfers are measured. Of the
phases inside a layer call only the lengths are; they are drawn one after the other in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.atomic import write_json
from prefetch.recorder import RunRecord

DEFAULT_FORWARDS = 64  # a few MB of JSON for 48 layers
COMPUTE, TRANSFERS = 1, 2  # process ids
FORWARD_TRACK, LAYER_TRACK, PHASE_TRACK = 0, 1, 2  # thread ids of the compute process
CALL_PHASES = {  # as drawn
    "overhead_s": "overhead",
    "predictor_s": "predictor",
    "stall_s": "stall",
    "expert_s": "expert compute",
}
COLOURS = {  # names that Chrome's viewer knows; Perfetto colours slices by name
    "dense": "grey",
    "expert compute": "thread_state_running",
    "stall": "terrible",
    "predictor": "thread_state_runnable",
    "overhead": "yellow",
    "demand": "terrible",
    "preload": "thread_state_iowait",
    "prefetch, useful": "good",
    "prefetch, late": "bad",
    "prefetch, wasted": "grey",
}

Event = dict[str, Any]


def timeline(record: RunRecord, first_forward: int = 0, n_forwards: int = DEFAULT_FORWARDS) -> dict[str, Any]:
    """The trace of `n_forwards` forward passes, from the run's `first_forward`-th on, and of the transfers that ran meanwhile.

    Time 0 is the start of the first forward pass drawn; preloads are drawn, before it, with the run's first. `otherData` says which
    part of the run is drawn.
    """
    drawn = record.forwards.iloc[first_forward : first_forward + n_forwards]
    events = list(_names())
    if len(drawn):
        origin_s = float(drawn["start_s"].iloc[0])
        end_s = float((drawn["start_s"] + drawn["wall_s"]).max())
        timed = record.calls[
            record.calls["start_s"].notna()
        ]  # a device-driven run's calls are not: only its forward passes are drawn
        calls = timed.merge(drawn[["sequence", "step"]], on=["sequence", "step"]).sort_values("start_s", kind="stable")
        since_s = -inf if first_forward == 0 else origin_s
        moved = record.transfers[(record.transfers["finished_s"] >= since_s) & (record.transfers["started_s"] <= end_s)]
        events += _forward_events(drawn, origin_s)
        events += _call_events(calls, origin_s)
        events += _dense_events(drawn, calls, origin_s) if len(timed) else ()
        events += _transfer_events(moved, origin_s)
    last = first_forward + len(drawn) - 1
    other = {
        "drawn": f"forward passes {first_forward} to {last} of {len(record.forwards)}" if len(drawn) else "no forward pass",
        "phases": "lengths are measured; order within a layer call is not",
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def write_timeline(record: RunRecord, path: Path, first_forward: int = 0, n_forwards: int = DEFAULT_FORWARDS) -> None:
    """Write `timeline` to `path` as JSON, atomically."""
    write_json(path, timeline(record, first_forward, n_forwards))


def _names() -> Iterator[Event]:
    for process, name in ((COMPUTE, "compute"), (TRANSFERS, "transfers")):
        yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    for track, name in ((FORWARD_TRACK, "forward passes"), (LAYER_TRACK, "MoE layers"), (PHASE_TRACK, "phases")):
        yield _track_name(COMPUTE, track, name)


def _track_name(process: int, track: int, name: str) -> Event:
    return {"ph": "M", "name": "thread_name", "pid": process, "tid": track, "args": {"name": name}}


def _slice(process: int, track: int, name: str, start_ns: int, end_ns: int, args: Event) -> Event:
    """One complete event. Times come as whole nanoseconds, so that neighbours meet without overlapping."""
    event = {"ph": "X", "pid": process, "tid": track, "name": name, "ts": start_ns / 1e3, "dur": (end_ns - start_ns) / 1e3}
    return event | {"args": args} | ({"cname": COLOURS[name]} if name in COLOURS else {})


def _rows(table: pd.DataFrame) -> Iterator[Any]:
    """Rows whose columns are attributes."""
    return iter(table.itertuples())


def _ns(seconds: float, origin_s: float) -> int:
    return round((seconds - origin_s) * 1e9)


def _forward_events(forwards: pd.DataFrame, origin_s: float) -> Iterator[Event]:
    for row in _rows(forwards):
        name = f"{row.phase} {row.sequence}.{row.step}"
        start, end = _ns(row.start_s, origin_s), _ns(row.start_s + row.wall_s, origin_s)
        args = {"sequence": row.sequence, "step": row.step, "tokens": row.n_tokens}
        yield _slice(COMPUTE, FORWARD_TRACK, name, start, end, args)


def _call_events(calls: pd.DataFrame, origin_s: float) -> Iterator[Event]:
    counts = ("needed", "hits", "late", "misses", "in_place")
    for row in _rows(calls):
        start, end = _ns(row.start_s, origin_s), _ns(row.start_s + row.total_s, origin_s)
        args = {count: int(getattr(row, count)) for count in counts}
        yield _slice(COMPUTE, LAYER_TRACK, f"layer {row.layer}", start, end, args)
        now_s = row.start_s
        for column, phase in CALL_PHASES.items():
            until_s = now_s + max(getattr(row, column), 0.0)
            begin, finish = _ns(now_s, origin_s), min(_ns(until_s, origin_s), end)
            if finish > begin:
                yield _slice(COMPUTE, PHASE_TRACK, phase, begin, finish, {"layer": row.layer})
            now_s = until_s


def _dense_events(forwards: pd.DataFrame, calls: pd.DataFrame, origin_s: float) -> Iterator[Event]:
    """What a forward pass does between its MoE layer calls."""
    calls_of = dict(iter(calls.groupby(["sequence", "step"])))
    for forward in _rows(forwards):
        now = _ns(forward.start_s, origin_s)
        inside = calls_of.get((forward.sequence, forward.step), calls.iloc[:0])
        starts_s, ends_s = inside["start_s"].tolist(), (inside["start_s"] + inside["total_s"]).tolist()
        end_s = forward.start_s + forward.wall_s
        for start_s, until_s in zip([*starts_s, end_s], [*ends_s, end_s], strict=True):
            if _ns(start_s, origin_s) > now:
                yield _slice(COMPUTE, PHASE_TRACK, "dense", now, _ns(start_s, origin_s), {})
            now = _ns(until_s, origin_s)


def _transfer_events(transfers: pd.DataFrame, origin_s: float) -> Iterator[Event]:
    """Each transfer in the first lane that is free when it starts."""
    free_at: list[int] = []
    for row in _rows(transfers.sort_values("started_s", kind="stable")):
        start, end = _ns(row.started_s, origin_s), _ns(row.finished_s, origin_s)
        lane = next((i for i, free in enumerate(free_at) if free <= start), len(free_at))
        if lane == len(free_at):
            free_at.append(end)
            yield _track_name(TRANSFERS, lane, f"lane {lane}")
        free_at[lane] = end
        args = {
            "key": f"layer {row.layer} expert {row.expert}",
            "slot": row.slot,
            "bytes": row.moved_bytes,
            "outcome": row.outcome,
            "lookahead": row.lookahead,
            "queued_us": round((row.started_s - row.submitted_s) * 1e6, 3),
        }
        yield _slice(TRANSFERS, lane, _transfer_name(row), start, end, args)


def _transfer_name(row: Any) -> str:
    if row.kind != "prefetch":
        return str(row.kind)
    return f"prefetch, {'late' if row.late else row.outcome}"
