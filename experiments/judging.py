"""Predictors without a running model: shown a recording through the same `predict` as live, so guesses are the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from predictors.base import LayerView, Prediction, Predictor
from predictors.lookahead import layers_ahead
from predictors.recording import RecordedDocument, Recording
from prefetch.errors import PredictorError
from prefetch.geometry import MoEGeometry
from prefetch.recorder import Recorder
from prefetch.trace import RoutingTrace


@dataclass
class Judged:
    """What a predictor said about one document."""

    trace: RoutingTrace  # routing and ranked guesses; residency is all False, see `experiments/residency.py`
    scores: dict[int, list[Tensor]]  # target layer -> per forward pass scores [T, E], the latest given for it
    chosen: dict[int, list[Tensor]]  # likewise, 1 where the router selected the expert
    decode_call_s: list[float] = field(default_factory=list)  # of each call that predicted for one token


@torch.inference_mode()
def judge(
    predictor: Predictor, recording: Recording, documents: Sequence[RecordedDocument], geometry: MoEGeometry
) -> Iterator[Judged]:
    """Show `documents` to a bound `predictor`, document n as sequence n; yields one judgement each.

    Raises:
        PredictorError: it raised, or gave scores of a wrong shape or NaN. Live it would be switched off; a judgement is not made.
    """
    for sequence, document in enumerate(documents):
        predictor.start_sequence()
        yield _judge_one(predictor, recording.views(document, sequence), geometry)


def _judge_one(predictor: Predictor, views: Iterable[LayerView], geometry: MoEGeometry) -> Judged:
    recorder, nothing_resident = Recorder(geometry), np.full(geometry.n_experts, -1, np.int32).tobytes()
    targets = range(geometry.n_layers)
    scores: dict[int, list[Tensor]] = {target: [] for target in targets}
    chosen: dict[int, list[Tensor]] = {target: [] for target in targets}
    call_s: list[float] = []
    pending: dict[int, Tensor] = {}  # target layer of this forward pass -> its latest, nearest scores, [T or 1, E]
    for_next_pass: dict[int, Tensor] = {}

    def hear(ask: Callable[[], list[Prediction]], seen: LayerView, *, before_attention: bool = False) -> None:
        began = time.perf_counter()
        predictions = _guarded(predictor, ask, seen.layer)
        ended = time.perf_counter()
        if predictions and len(seen.token_ids) == 1:
            call_s.append(ended - began)
        for prediction in predictions:
            _check(predictor, prediction, seen, geometry)
            ahead = layers_ahead(seen.layer, prediction.layer, geometry.n_layers, before_attention=before_attention)
            recorder.guessed(prediction, ahead, nothing_resident)
            meant_for = for_next_pass if ahead > prediction.layer else pending
            meant_for[prediction.layer] = prediction.scores.float()

    for seen in views:
        if seen.layer == 0:
            pending, for_next_pass = for_next_pass, {}
            recorder.begin_forward(seen.sequence, seen.step, seen.token_ids)
        if predictor.before_attention:
            hear(partial(_ask_before_attention, predictor, seen), seen, before_attention=True)
        recorder.routed(seen.topk_ids, seen.topk_weights)
        if seen.layer in pending and len(pending[seen.layer]) in (1, len(seen.token_ids)):
            given = pending[seen.layer].expand(len(seen.token_ids), -1)
            scores[seen.layer].append(given)
            chosen[seen.layer].append(torch.zeros_like(given).scatter_(1, seen.topk_ids, 1.0))
        hear(partial(predictor.predict, seen), seen)
        if seen.layer == geometry.n_layers - 1:
            recorder.end_forward()
    return Judged(recorder.trace({}), scores, chosen, call_s)


def samples(judged: Iterable[Judged]) -> dict[int, tuple[Tensor, Tensor]]:
    """Target layer -> (scores [N, E], chosen [N, E]) over all judgements, for layers that were predicted."""
    scores: dict[int, list[Tensor]] = {}
    chosen: dict[int, list[Tensor]] = {}
    for one in judged:
        for target, parts in one.scores.items():
            scores.setdefault(target, []).extend(parts)
            chosen.setdefault(target, []).extend(one.chosen[target])
    return {target: (torch.cat(parts), torch.cat(chosen[target])) for target, parts in scores.items() if parts}


def _ask_before_attention(predictor: Predictor, seen: LayerView) -> list[Prediction]:
    return predictor.predict_before_attention(seen.before_attention)


def _guarded(predictor: Predictor, ask: Callable[[], list[Prediction]], layer: int) -> list[Prediction]:
    try:
        return ask()
    except (ValueError, RuntimeError, IndexError, KeyError, AssertionError, AttributeError, TypeError) as error:
        raise PredictorError(
            f"predictor {predictor.name} failed at MoE layer {layer} ({type(error).__name__}: {error})"
        ) from error


def _check(predictor: Predictor, prediction: Prediction, seen: LayerView, geometry: MoEGeometry) -> None:
    n_tokens, scores = len(seen.token_ids), prediction.scores
    if scores.shape not in ((n_tokens, geometry.n_experts), (1, geometry.n_experts)) or bool(scores.isnan().any()):
        raise PredictorError(
            f"predictor {predictor.name}, MoE layer {seen.layer}: scores of shape {tuple(scores.shape)} or NaN; expected "
            f"({n_tokens} or 1, {geometry.n_experts}) numbers"
        )
