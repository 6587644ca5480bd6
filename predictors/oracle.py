"""Oracle: reads what the routers will choose from a recording of the same run. The ceiling of every other predictor.

With `accuracy` below 1 it names each true expert with that probability only, else a wrong one: how much does a
predictor's quality matter? Cost: none that a real predictor would have.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from predictors.base import LayerView, ModelView, Prediction, Predictor
from predictors.lookahead import check_lookahead, coming_layers
from prefetch.errors import ConfigError, TraceError
from prefetch.trace import RoutingTrace


@dataclass
class Oracle(Predictor):
    """Scores are ranks: k for the expert the router will rank first, 1 for its last, -inf for all others."""

    accuracy: float = 1.0  # probability that a true expert is named; its set recall in expectation, token by token
    lookahead: int = 1  # predicts this many coming layers, nearest first, into the next forward pass
    seed: int = 0  # of the draws that make it wrong
    trace: RoutingTrace | None = field(default=None, init=False, repr=False)

    name = "oracle"
    reads_states = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.accuracy <= 1.0:
            raise ConfigError(f"predictor.accuracy={self.accuracy}: it must be from 0 to 1")

    def use_trace(self, trace: RoutingTrace) -> None:
        """Take the recording of the run that is about to be repeated. Call it before `bind`."""
        self.trace = trace

    def bind(self, model: ModelView) -> None:
        """Prepare all guesses.

        Raises:
            ConfigError: no trace was given, or the model has too few experts to draw wrong ones from.
            TraceError: the trace has other sizes than the model.
        """
        super().bind(model)
        check_lookahead(self.lookahead, model.n_layers)
        trace = self._trace_of(model)
        self.rows = {(f.sequence, f.step): f.rows for f in trace.forwards()}
        self.token_ids = torch.from_numpy(trace.token_ids.astype(np.int64))
        self.true_ids = [torch.from_numpy(trace.topk_ids[:, layer].astype(np.int64)) for layer in range(model.n_layers)]
        self.guessed_ids = self.true_ids if self.accuracy == 1.0 else self._mistaken(model)
        self.rank_scores = torch.arange(model.top_k, 0, -1, dtype=torch.float32)

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Scores [T, E]; [1, E] for the next forward pass where that has another number of tokens.

        Raises:
            TraceError: this forward pass is not in the trace, or the trace saw other tokens or another model's routing.
        """
        if seen.layer == 0:
            self._check_same_run(seen)
        predictions = []
        for target in coming_layers(seen.layer, self.lookahead, self.model.n_layers):
            rows = self.rows.get((seen.sequence, seen.step + (target <= seen.layer)))
            if rows is None:
                break  # the sequence ends with this forward pass
            predictions.append(Prediction(target, self._scores(self.guessed_ids[target][rows], len(seen.topk_ids))))
        return predictions

    def _scores(self, ids: Tensor, n_tokens: int) -> Tensor:
        if len(ids) not in (1, n_tokens):  # from a prefill to a batch: one ranking for all, by how many tokens want it
            votes = torch.bincount(ids.reshape(-1), minlength=self.model.n_experts).float()
            return votes.where(votes > 0, -torch.inf).unsqueeze(0)
        scores = torch.full((len(ids), self.model.n_experts), -torch.inf)
        return scores.scatter_(1, ids, self.rank_scores.expand_as(ids))

    def _mistaken(self, model: ModelView) -> list[Tensor]:
        """Per layer [N, k]: the true ids, each replaced with probability 1 - accuracy by a wrong one, all distinct."""
        if model.n_experts < 2 * model.top_k:
            raise ConfigError(
                f"predictor.accuracy={self.accuracy}: top-{model.top_k} of {model.n_experts} experts leaves "
                "too few wrong ones to draw; use accuracy=1"
            )
        random = torch.Generator().manual_seed(self.seed)
        mistaken = []
        for true in self.true_ids:
            lots = torch.rand(len(true), model.n_experts, generator=random).scatter_(1, true, -1.0)
            kept = torch.rand(true.shape, generator=random) < self.accuracy
            mistaken.append(true.where(kept, lots.topk(model.top_k).indices))
        return mistaken

    def _trace_of(self, model: ModelView) -> RoutingTrace:
        if self.trace is None:
            raise ConfigError("predictor=oracle needs the routing trace of the same run; record one first")
        wanted = model.n_layers, model.n_experts, model.top_k
        found = self.trace.n_layers, self.trace.n_experts, self.trace.top_k
        if found != wanted:
            raise TraceError(
                f"the routing trace is of another model: its (MoE layers, experts, top-k) is {found}, not {wanted}"
            )
        return self.trace

    def _check_same_run(self, seen: LayerView) -> None:
        """Once per forward pass: the first layer's tokens and routing depend on nothing an arm may change."""
        where = f"sequence {seen.sequence}, step {seen.step}"
        rows = self.rows.get((seen.sequence, seen.step))
        if rows is None:
            raise TraceError(f"the routing trace ends before the run: it lacks {where}; record the same workload")
        if not torch.equal(self.token_ids[rows], seen.token_ids.cpu()):
            raise TraceError(f"the routing trace saw other tokens at {where}; record the same workload")
        if not torch.equal(self.true_ids[0][rows], seen.topk_ids.cpu()):
            raise TraceError(f"the routing trace is of another model: layer 0 routed differently at {where}")
