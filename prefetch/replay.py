"""Replay: recorded routing through the same runtime as live, under another link, machine, cache, predictor or planner.

Only the clock, the transfers and the computing differ: time passes where `Costs` and the link say so, and nothing is moved or
computed. Trace once, replay many. What comes out is simulated, and is called so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from predictors.base import AttentionView, LayerView, ModelView, Prediction, Predictor
from prefetch.clock import VirtualClock
from prefetch.costs import Costs
from prefetch.errors import PredictorError
from prefetch.geometry import ExpertGeometry, ExpertKey, MoEGeometry
from prefetch.runtime import OffloadRuntime
from prefetch.trace import RoutingTrace


@dataclass(frozen=True)
class SizedExpert(ExpertGeometry):
    """An expert of which nothing is known but what it takes: its row's bytes."""

    n_bytes: int = 0

    @property
    def row_bytes(self) -> int:
        return self.n_bytes


class TimedPredictor(Predictor):
    """`predictor`, which takes `seconds` of `clock`'s time at every layer: before its attention if it is asked there, else after."""

    def __init__(self, predictor: Predictor, clock: VirtualClock, seconds: float):
        self.predictor, self.clock, self.seconds = predictor, clock, seconds
        self.sees_every_call, self.name = predictor.sees_every_call, predictor.name

    def bind(self, model: ModelView) -> None:
        self.predictor.bind(model)
        self.before_attention = self.predictor.before_attention

    def start_sequence(self) -> None:
        self.predictor.start_sequence()

    def n_parameters(self) -> int:
        return self.predictor.n_parameters()

    def predict(self, seen: LayerView) -> list[Prediction]:
        if not self.before_attention:  # else it has been paid for: what a layer takes is both calls together
            self.clock.advance(self.seconds)
        return self.predictor.predict(seen)

    def predict_before_attention(self, seen: AttentionView) -> list[Prediction]:
        self.clock.advance(self.seconds)
        return self.predictor.predict_before_attention(seen)


def geometry_of(trace: RoutingTrace, expert_bytes: int) -> MoEGeometry:
    """The model of `trace`, with experts of `expert_bytes` bytes."""
    expert = SizedExpert(0, 0, torch.uint8, expert_bytes)
    return MoEGeometry(trace.n_layers, trace.n_experts, trace.top_k, expert)


def check_replayable(predictor: Predictor) -> None:
    """Raise PredictorError unless `predictor` needs nothing that a trace lacks."""
    if predictor.reads_states:
        raise PredictorError(
            f"predictor {predictor.name} reads hidden states, which a routing trace does not hold: decode with it once, and replay its "
            "guesses from the trace of that run (predictor=recorded)"
        )


def replay(
    runtime: OffloadRuntime,
    trace: RoutingTrace,
    clock: VirtualClock,
    costs: Costs,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Serve every forward pass of `trace` with `runtime`, whose clock, transfers and compute go by `clock`.

    Args:
        trace: its sequences are numbered from 0, and their steps too.
        progress: called after each forward pass.

    Raises:
        TraceError, ConfigError: as the predictor; a predictor that raises anything else is switched off, as live.
    """
    runtime.bind(_view(runtime.geometry))
    ids = torch.from_numpy(trace.topk_ids.astype(np.int64))
    weights = torch.tensor(trace.topk_weights)  # a copy: a worker's trace may be mapped, and not writable
    token_ids = torch.from_numpy(trace.token_ids.astype(np.int64))
    for forward in trace.forwards():
        rows = forward.rows
        runtime.begin_forward(token_ids[rows], new_sequence=forward.step == 0)
        nothing = torch.empty(rows.stop - rows.start, 0)
        for layer in range(trace.n_layers):
            runtime.before_attention(layer, nothing)
            clock.advance(costs.dense_s)
            runtime.layer_call(layer, nothing, ids[rows, layer], weights[rows, layer])
        runtime.end_forward()
        progress()
    runtime.finish()


def no_reading(key: ExpertKey) -> tuple[Tensor, Tensor]:
    """There are no weights to read; `TimedExperts` asks for none."""
    raise AssertionError(f"a replay has no weights of {key}")


def _view(geometry: MoEGeometry) -> ModelView:
    """A model of which only the sizes are known."""
    unknown = [_no_states] * geometry.n_layers
    return ModelView(geometry.n_layers, geometry.n_experts, geometry.top_k, 0, unknown, unknown)


def _no_states(states: Tensor) -> Tensor:
    raise PredictorError("a replay has no hidden states to compute with")
