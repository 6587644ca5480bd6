"""Which part of a run counts: what comes after its first sequences, which found caches, files and predictors cold."""

from __future__ import annotations

import dataclasses
from math import inf

from prefetch.accounting import is_preload
from prefetch.recorder import RunRecord
from prefetch.trace import ROW_ARRAYS, RoutingTrace


def record_after(record: RunRecord, n_sequences: int) -> RunRecord:
    """The rows of `record` from the `n_sequences`-th sequence on, and the preloads, which belong to the whole run."""
    calls, forwards = (table[table["sequence"] >= n_sequences] for table in (record.calls, record.forwards))
    transfers = record.transfers
    return RunRecord(calls, forwards, transfers[(transfers["sequence"] >= n_sequences) | is_preload(transfers)])


def trace_after(trace: RoutingTrace, n_sequences: int, end: float = inf) -> RoutingTrace:
    """Likewise, the rows of `trace`; before the `end`-th sequence."""
    kept = (trace.sequence >= n_sequences) & (trace.sequence < end)
    arrays = {name: getattr(trace, name)[kept] for name in ROW_ARRAYS}
    guesses, resident = ({d: a[kept] for d, a in group.items()} for group in (trace.guesses, trace.resident))
    return dataclasses.replace(trace, **arrays, guesses=guesses, resident=resident)


def counted_calls(trace: RoutingTrace, n_sequences: int) -> list[bool]:
    """For each layer call of `trace` whether it decodes, and counts."""
    return [f.step > 0 and f.sequence >= n_sequences for f in trace.forwards() for _ in range(trace.n_layers)]
