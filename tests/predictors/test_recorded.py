"""Guesses that are repeated are those that were made, token by token, and at the layer where they were made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.after_warmup import trace_after
from predictors.base import LayerView, stable_top
from predictors.lookahead import layers_ahead
from predictors.previous_token import PreviousToken
from predictors.recorded import Recorded
from prefetch.errors import ConfigError, TraceError
from prefetch.recorder import Recorder
from prefetch.replay import geometry_of
from prefetch.trace import RoutingTrace
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, TOP_K, Run, make_run, show

Guesses = dict[tuple[int, int, int, int], list[list[int]]]  # (sequence, step, layer, lookahead) -> ids by rank, row by row


def recorded(run: Run, lookahead: int = 2) -> RoutingTrace:
    """The run's trace, with what `PreviousToken` said in it."""
    recorder = Recorder(geometry_of(run.trace, 4096))
    for view, predictions in show(PreviousToken(lookahead), run):
        if view.layer == 0:
            recorder.begin_forward(view.sequence, view.step, view.token_ids)
        recorder.routed(view.topk_ids, view.topk_weights)
        for prediction in predictions:
            ahead = layers_ahead(view.layer, prediction.layer, N_LAYERS)
            recorder.guessed(prediction, ahead, np.full(N_EXPERTS, -1, np.int32).tobytes())
    return recorder.trace({})


def ranked(view: LayerView, layer: int, scores: torch.Tensor) -> list[list[int]]:
    """The ids that `scores` name, likeliest first, for each token."""
    rows = scores.expand(len(view.token_ids), -1) if layer > view.layer else scores
    best = stable_top(rows, 2 * TOP_K)
    return [[e for e in row if scores_row[e] != -torch.inf] for row, scores_row in zip(best.tolist(), rows, strict=True)]


def said(predictor: PreviousToken | Recorded, run: Run) -> Guesses:
    found: Guesses = {}
    for view, predictions in show(predictor, run):
        for p in predictions:
            ahead = layers_ahead(view.layer, p.layer, N_LAYERS)
            found[view.sequence, view.step, view.layer, ahead] = ranked(view, p.layer, p.scores)
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_what_was_guessed_is_guessed_again(batch: int) -> None:
    run = make_run(batch=batch)
    trace = recorded(run)
    again = said(Recorded(), dataclasses.replace(run, trace=trace))
    first = {where: guess for where, guess in said(PreviousToken(2), run).items() if where in again or any(guess)}
    last_step = int(trace.step.max())
    for (sequence, step, layer, ahead), guess in first.items():
        into_next_pass = layer + ahead >= N_LAYERS
        if into_next_pass and step == last_step:
            continue  # the sequence ended: nobody was left to guess for
        if into_next_pass and batch > 1 and step == 0:
            continue  # one ranking for all after the prompt: it stands in the rows of several tokens
        assert again[sequence, step, layer, ahead] == guess, (sequence, step, layer, ahead)


def test_guesses_may_come_from_another_file_of_the_same_run(tmp_path: Path) -> None:
    run = make_run()
    path = tmp_path / "trace_previous_token.safetensors"
    recorded(run).save(path)
    bare = dataclasses.replace(run.trace, guesses={}, resident={})
    from_file = said(Recorded(guesses=str(path)), dataclasses.replace(run, trace=bare))
    assert from_file == said(Recorded(), dataclasses.replace(run, trace=recorded(run)))
    nearer = said(Recorded(guesses=str(path), lookahead=1), dataclasses.replace(run, trace=bare))
    assert nearer == {where: guess for where, guess in from_file.items() if where[3] == 1}


def test_the_first_sequences_of_a_run_may_be_replayed_alone(tmp_path: Path) -> None:
    run = make_run()
    path = tmp_path / "trace_previous_token.safetensors"
    recorded(run).save(path)
    first = trace_after(run.trace, 0, 1)
    assert 0 < first.n_tokens < run.trace.n_tokens
    predictor = Recorded(guesses=str(path))
    predictor.use_trace(first)
    predictor.bind(run.model)
    assert max(rows.stop for rows in predictor.rows.values()) == first.n_tokens
    trace_after(recorded(run), 0, 1).save(path)
    with pytest.raises(TraceError, match="other routing"):
        next(show(Recorded(guesses=str(path)), run))


def test_guesses_of_another_run_or_none_at_all_are_refused(tmp_path: Path) -> None:
    run = make_run()
    path = tmp_path / "other.safetensors"
    recorded(make_run(seed=1)).save(path)
    with pytest.raises(TraceError, match="other.safetensors: made in a run with other routing"):
        next(show(Recorded(guesses=str(path)), run))
    with pytest.raises(TraceError, match="no such routing trace"):
        next(show(Recorded(guesses=str(tmp_path / "none.safetensors")), run))
    bare = dataclasses.replace(run, trace=dataclasses.replace(run.trace, guesses={}, resident={}))
    with pytest.raises(ConfigError, match="holds no guesses"):
        next(show(Recorded(), bare))
    with pytest.raises(ConfigError, match="experiments.replay"):
        Recorded().bind(run.model)
