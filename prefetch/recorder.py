"""What happened in a run: one row per layer call, forward pass and transfer, and the routing itself.

The hot path appends tuples and keeps references; tables and arrays are built when the run is over.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from predictors.base import Prediction, stable_top
from prefetch.fast_tier import TransferRecord
from prefetch.geometry import MoEGeometry
from prefetch.trace import RoutingTrace

CALL_COLUMNS = [
    "sequence", "step", "phase", "layer", "n_tokens", "needed", "hits", "late", "misses", "in_place",
    "start_s", "total_s", "stall_s", "expert_s", "predictor_s", "overhead_s",
]  # fmt: skip
FORWARD_COLUMNS = ["sequence", "step", "phase", "n_tokens", "start_s", "wall_s"]
TRANSFER_COLUMNS = [
    "sequence", "step", "layer", "expert", "slot", "kind", "outcome", "late", "lookahead",
    "n_bytes", "moved_bytes", "submitted_s", "started_s", "finished_s",
]  # fmt: skip


@dataclass
class RunRecord:
    """Tables of one run. Times are seconds since the run's first forward pass (transfers may precede)."""

    calls: pd.DataFrame
    forwards: pd.DataFrame
    transfers: pd.DataFrame


@dataclass
class CallTimer:
    """Where one layer call's time goes. The runtime adds to the parts; what it adds to none of them is overhead."""

    start_s: float = 0.0
    stall_s: float = 0.0
    expert_s: float = 0.0
    predictor_s: float = 0.0


@dataclass
class Forward:
    """What one forward pass routed and predicted."""

    sequence: int
    step: int
    token_ids: Tensor
    start_s: float
    topk_ids: list[Tensor] = field(default_factory=list)
    topk_weights: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Guess:
    """One prediction as it was made: scores for `layer` of forward (sequence, step), and which slots held its experts then."""

    sequence: int
    step: int
    layer: int
    lookahead: int
    scores: Tensor  # [T or 1, E]
    slots: bytes  # int32 [E], -1 = absent, as `SlotBooks.slots_of` gives it


def phase_of(step: int) -> str:
    """Step 0 of a sequence is its prefill, all others decode."""
    return "decode" if step else "prefill"


class Recorder:
    """Collects one run. Not thread-safe: only the compute thread calls it. `clock` gives the present in seconds."""

    def __init__(self, geometry: MoEGeometry, clock: Callable[[], float] = time.perf_counter):
        self.geometry, self.clock = geometry, clock
        self.calls: list[tuple] = []
        self.forwards: list[Forward] = []
        self.wall_s: list[float] = []
        self.guesses: list[Guess] = []

    def begin_forward(self, sequence: int, step: int, token_ids: Tensor) -> None:
        """A forward pass over `token_ids` [T] begins."""
        self.forwards.append(Forward(sequence, step, token_ids, self.clock()))

    def end_forward(self) -> None:
        """The forward pass under way has ended."""
        self.wall_s.append(self.clock() - self.forwards[-1].start_s)

    def drop_unfinished(self) -> None:
        """Forget a forward pass that raised."""
        del self.forwards[len(self.wall_s) :]

    def routed(self, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """The next layer's router selected `topk_ids` [T, k]."""
        self.forwards[-1].topk_ids.append(topk_ids)
        self.forwards[-1].topk_weights.append(topk_weights)

    def guessed(self, prediction: Prediction, lookahead: int, slots: bytes) -> None:
        """A predictor's scores, made `lookahead` layers ahead in the forward pass under way; `slots` of the layer they are for."""
        now = self.forwards[-1]
        next_pass = lookahead > prediction.layer
        self.guesses.append(Guess(now.sequence, now.step + next_pass, prediction.layer, lookahead, prediction.scores, slots))

    def called(self, layer: int, n_tokens: int, counts: Sequence[int], timer: CallTimer, end_s: float) -> None:
        """One layer call is over. `counts` = needed, hits, late, misses, computed on the CPU."""
        now = self.forwards[-1]
        total = end_s - timer.start_s
        parts = timer.stall_s, timer.expert_s, timer.predictor_s
        self.calls.append(
            (
                now.sequence,
                now.step,
                phase_of(now.step),
                layer,
                n_tokens,
                *counts,
                timer.start_s,
                total,
                *parts,
                total - sum(parts),
            )
        )

    def record(self, transfers: Sequence[TransferRecord]) -> RunRecord:
        """The run's tables; `transfers` is the fast tier's list, after it has finished."""
        origin_s = self.forwards[0].start_s if self.forwards else 0.0
        calls = pd.DataFrame(self.calls, columns=CALL_COLUMNS)
        forwards = pd.DataFrame(
            [
                (f.sequence, f.step, phase_of(f.step), len(f.token_ids), f.start_s, wall_s)
                for f, wall_s in zip(self.forwards, self.wall_s, strict=True)
            ],
            columns=FORWARD_COLUMNS,
        )
        moved = pd.DataFrame([_transfer_row(r) for r in transfers], columns=TRANSFER_COLUMNS)
        for table, columns in ((calls, ["start_s"]), (forwards, ["start_s"])):
            table[columns] -= origin_s
        times = ["submitted_s", "started_s", "finished_s"]
        moved[times] = moved[times].where(moved[times] > 0) - origin_s  # 0 = it never happened
        return RunRecord(calls, forwards, moved)

    def trace(self, metadata: dict[str, str]) -> RoutingTrace:
        """The routing of the run, and what was guessed of it."""
        steps = [np.full(len(f.token_ids), f.step, np.int32) for f in self.forwards]
        step = np.concatenate(steps)
        return RoutingTrace(
            sequence=np.concatenate([np.full(len(f.token_ids), f.sequence, np.int32) for f in self.forwards]),
            step=step,
            phase=(step > 0).astype(np.uint8),
            token_ids=torch.cat([f.token_ids for f in self.forwards]).numpy().astype(np.int32),
            topk_ids=_stack([f.topk_ids for f in self.forwards]).astype(np.uint16),
            topk_weights=_stack([f.topk_weights for f in self.forwards]).astype(np.float32),
            **self._guess_arrays(),
            n_experts=self.geometry.n_experts,
            metadata=metadata | {"row_bytes": str(self.geometry.expert.row_bytes)},
        )

    def _guess_arrays(self) -> dict[str, dict[int, np.ndarray]]:
        """Ranked guesses and residency per lookahead, at the rows of the tokens they were made for."""
        n_layers, n_experts = self.geometry.n_layers, self.geometry.n_experts
        width = min(n_experts, 2 * self.geometry.top_k)
        first_row: dict[tuple[int, int], tuple[int, int]] = {}
        n_rows = 0
        for forward in self.forwards:
            first_row[forward.sequence, forward.step] = n_rows, len(forward.token_ids)
            n_rows += len(forward.token_ids)
        guesses: dict[int, np.ndarray] = defaultdict(lambda: np.full((n_rows, n_layers, width), -1, np.int16))
        resident: dict[int, np.ndarray] = defaultdict(lambda: np.zeros((n_rows, n_layers, n_experts), bool))
        for guess in self.guesses:
            if (guess.sequence, guess.step) not in first_row:
                continue  # made for a forward pass that never came: the sequence ended
            row, n_tokens = first_row[guess.sequence, guess.step]
            ranked = stable_top(guess.scores, width).numpy()
            never = torch.isneginf(guess.scores).numpy()
            ranked = np.where(np.take_along_axis(never, ranked, axis=1), -1, ranked)
            if len(ranked) not in (1, n_tokens):
                continue  # scores per prompt token say nothing about the one token that follows
            guesses[guess.lookahead][row : row + n_tokens, guess.layer] = ranked
            resident[guess.lookahead][row : row + n_tokens, guess.layer] = np.frombuffer(guess.slots, np.int32) >= 0
        return {"guesses": dict(guesses), "resident": dict(resident)}


def _stack(per_forward: list[list[Tensor]]) -> np.ndarray:
    """[N, L, k] from, per forward pass, L tensors [T, k]."""
    return torch.cat([torch.stack(layers, dim=1) for layers in per_forward]).float().numpy()


def _transfer_row(record: TransferRecord) -> tuple:
    t = record.transfer
    return (
        record.sequence, record.step, t.key.layer, t.key.expert, t.slot, record.kind, record.outcome, record.late,
        record.lookahead, t.n_bytes, t.moved_bytes, t.submitted_s, t.started_s, t.finished_s,
    )  # fmt: skip
