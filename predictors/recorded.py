"""Recorded: the guesses that a predictor made in the run that a trace is of, made again when that trace is replayed.

So a predictor that needs hidden states can be studied under another link, cache or planner, where only routing was kept. Its ranks are
its scores. Cost: none that could be measured here; a replay charges what it is told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from predictors.base import AttentionView, LayerView, ModelView, Prediction, Predictor
from predictors.lookahead import check_lookahead
from prefetch.errors import ConfigError, TraceError
from prefetch.trace import RoutingTrace


@dataclass
class Recorded(Predictor):
    """Scores fall with the rank; an expert that the trace does not name is never predicted."""

    guesses: str | None = None  # trace file that holds them, of the very routing that is replayed; null = the replayed one
    lookahead: int | None = None  # repeats guesses for at most this many layers ahead; null = all that the trace holds
    trace: RoutingTrace | None = field(default=None, init=False, repr=False)

    name = "recorded"
    reads_states = False

    def use_trace(self, trace: RoutingTrace) -> None:
        """Take the trace that is about to be replayed. Call it before `bind`."""
        self.trace = trace

    def bind(self, model: ModelView) -> None:
        """Find the guesses.

        Raises:
            ConfigError: there is no trace, or it holds no guesses, or none as far ahead.
            TraceError: the file of guesses cannot be read, or is of another run.
        """
        super().bind(model)
        if self.trace is None:
            raise ConfigError("predictor=recorded repeats the guesses of a trace: it works in experiments.replay")
        self.ranked = self._of_this_run(self.trace).guesses  # d -> [N, L, m]
        held = sorted(self.ranked)
        if not held:
            raise ConfigError(
                "predictor=recorded: the trace holds no guesses; name that of an arm which predicted, e.g. "
                "predictor.guesses=outputs/decode/.../trace_gate_reuse.safetensors"
            )
        if self.lookahead is not None:
            check_lookahead(self.lookahead, held[-1])
        self.lookaheads = [d for d in held if self.lookahead is None or d <= self.lookahead]  # nearest first
        self.before_attention = 0 in self.lookaheads
        self.rows = {(f.sequence, f.step): f.rows for f in self.trace.forwards()}

    def _of_this_run(self, replayed: RoutingTrace) -> RoutingTrace:
        if self.guesses is None:
            return replayed
        found = RoutingTrace.load(Path(self.guesses))
        if not np.array_equal(found.topk_ids[: replayed.n_tokens], replayed.topk_ids):  # of which less may be replayed
            raise TraceError(
                f"predictor.guesses={self.guesses}: made in a run with other routing than the trace that is replayed"
            )
        return found

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Scores [T, E], or [1, E], of the layers that were guessed here."""
        found = [self._guess(seen, lookahead) for lookahead in self.lookaheads if lookahead > 0]
        return [prediction for prediction in found if prediction is not None]

    def predict_before_attention(self, seen: AttentionView) -> list[Prediction]:
        """Likewise, of this very layer."""
        prediction = self._guess(seen, 0)
        return [] if prediction is None else [prediction]

    def _guess(self, seen: LayerView | AttentionView, lookahead: int) -> Prediction | None:
        target = (seen.layer + lookahead) % self.model.n_layers
        rows = self.rows.get((seen.sequence, seen.step + (lookahead > target)))
        if rows is None:
            return None  # the sequence ends with this forward pass
        ranked = self.ranked[lookahead][rows, target]
        if not (ranked >= 0).any() or len(ranked) not in (1, len(seen.token_ids)):
            return None
        return Prediction(target, self._scores(ranked))

    def _scores(self, ranked: np.ndarray) -> Tensor:
        """[T, E] from ids [T, m], likeliest first, -1 = none."""
        n_tokens, m = ranked.shape
        scores = torch.full((n_tokens, self.model.n_experts + 1), -torch.inf)
        ids = torch.from_numpy(np.where(ranked < 0, self.model.n_experts, ranked).astype(np.int64))
        scores.scatter_(1, ids, torch.arange(m, 0, -1, dtype=torch.float32).expand(n_tokens, m))
        return scores[:, :-1]
