"""A made-up run whose every figure is known: two prompts, decoded in steps of fixed length, with all kinds of transfers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from prefetch.recorder import CALL_COLUMNS, FORWARD_COLUMNS, TRANSFER_COLUMNS, RunRecord

N_LAYERS, BATCH, ROW_BYTES = 3, 2, 1000
FORWARD_S, GAP_S, PREFILL_S = 0.10, 0.02, 0.50  # between forward passes the token is chosen
PARTS_S = {"stall_s": 0.010, "expert_s": 0.006, "predictor_s": 0.001, "overhead_s": 0.003}  # of each layer call


def make_record(n_sequences: int = 2, n_decoded: int = 4) -> RunRecord:
    """Each layer call needs 4 experts: 2 hits (one of them prefetched), 1 late, 1 miss; each also wastes one prefetch,
    and cancels another half-way. All prefetches are for the layer they are used in, one layer ahead."""
    calls: list[dict] = []
    forwards: list[tuple] = []
    transfers: list[tuple] = []
    now_s = 0.0
    for sequence in range(n_sequences):
        for step in range(1 + n_decoded):
            phase, wall_s = ("decode", FORWARD_S) if step else ("prefill", PREFILL_S)
            n_tokens = BATCH if step else BATCH * 8
            forwards.append((sequence, step, phase, n_tokens, now_s, wall_s))
            for layer in range(N_LAYERS):
                start_s = now_s + (layer + 0.2) * wall_s / N_LAYERS
                counts = {"needed": 4, "hits": 2, "late": 1, "misses": 1, "in_place": 0}
                where = {"sequence": sequence, "step": step, "phase": phase, "layer": layer, "n_tokens": n_tokens}
                calls.append(where | counts | PARTS_S | {"start_s": start_s, "total_s": sum(PARTS_S.values())})
                transfers += _transfers_of(sequence, step, layer, start_s)
            now_s += wall_s + GAP_S
        now_s += 1.0  # between prompts, no part of any metric
    return RunRecord(
        pd.DataFrame(calls)[CALL_COLUMNS],
        pd.DataFrame(forwards, columns=FORWARD_COLUMNS),
        pd.DataFrame(transfers, columns=TRANSFER_COLUMNS),
    )


def _transfers_of(sequence: int, step: int, layer: int, start_s: float) -> list[tuple]:
    """One demand load, and prefetches for this call: useful, late, wasted, cancelled half-way, cancelled in the queue."""
    submitted_step = step - (layer == 0 and step > 0)  # layer 0 is predicted by the last layer of the forward pass before
    ahead = 1 if layer or step else 0
    rows = [
        (step, 0, "demand", "demand", False, 0, ROW_BYTES, 0.000, 0.004),
        (submitted_step, 1, "prefetch", "useful", False, ahead, ROW_BYTES, -0.009, -0.005),
        (submitted_step, 2, "prefetch", "useful", True, ahead, ROW_BYTES, -0.005, 0.002),
        (submitted_step, 3, "prefetch", "wasted", False, ahead, ROW_BYTES, -0.004, 0.001),
        (submitted_step, 4, "prefetch", "cancelled", False, ahead, ROW_BYTES // 2, -0.003, 0.001),
        (submitted_step, 5, "prefetch", "cancelled", False, ahead, 0, np.nan, 0.001),
    ]
    return [
        (sequence, at, layer, expert, expert, kind, outcome, late, d, ROW_BYTES, moved, start_s, start_s + begin, start_s + end)
        for at, expert, kind, outcome, late, d, moved, begin, end in rows
    ]
