"""The sequence forecast: live it says what it was trained to say, it learns a pattern from token to token, and it forgets."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from predictors.base import LayerView
from predictors.fitting import FitOptions, fit
from predictors.sequence import SPAN, ActivationSequence
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, TOP_K, Run, make_run, record, show, views_per_layer


def in_turns(n_sequences: int, seed: int) -> Run:
    """Random states, but routing that goes round: every layer's experts are those of the token before, plus one."""
    run, random = make_run(n_sequences, seed=seed), torch.Generator().manual_seed(seed)
    views: list[LayerView] = []
    last: dict[int, torch.Tensor] = {}
    for view in run.views:
        if view.step == 0:
            start = torch.randint(N_EXPERTS, (1,), generator=random)
            last[view.layer] = start + torch.tensor([0, 3])
        rows = []
        for _ in view.token_ids:
            last[view.layer] = (last[view.layer] + 1) % N_EXPERTS
            rows.append(last[view.layer])
        views.append(dataclasses.replace(view, topk_ids=torch.stack(rows)))
    return Run(run.model, views, record(views))


@pytest.fixture(scope="module")
def trained() -> ActivationSequence:
    run, held_out = in_turns(60, 0), in_turns(10, 1)
    predictor = ActivationSequence(width=32)
    options = FitOptions(epochs=40, patience=40, batch_rows=SPAN, learning_rate=2e-2)
    fit(predictor, run.model, views_per_layer(run), views_per_layer(held_out), options)
    return predictor


def test_it_learns_what_goes_from_token_to_token(trained: ActivationSequence) -> None:
    found, forecast = [], {}
    for view, predictions in show(trained, in_turns(8, 2)):
        if view.step > 0:
            best = forecast[view.layer].topk(TOP_K).indices
            found.append((view.topk_ids[:, :, None] == best[:, None, :]).any(-1).float().mean())
        if predictions:
            forecast = {p.layer: p.scores for p in predictions}
    assert float(torch.stack(found).mean()) > 0.9  # chance is a quarter


def test_live_forecasts_are_those_of_training(trained: ActivationSequence) -> None:
    run = in_turns(1, 3)
    whole = trained.logits(views_per_layer(run))
    n_prompt = len(run.views[0].token_ids)
    live = [predictions for view, predictions in show(trained, run) if view.layer == N_LAYERS - 1]
    for step, predictions in enumerate(live[:-1]):  # what the last one is for never came
        assert [p.layer for p in predictions] == list(range(N_LAYERS))
        for p in predictions:
            torch.testing.assert_close(p.scores[0], whole[p.layer][n_prompt + step], rtol=1e-4, atol=1e-4)


def test_a_new_sequence_starts_from_nothing(trained: ActivationSequence) -> None:
    run = in_turns(2, 4)
    second = [view for view in run.views if view.sequence == 1]
    alone = [p.scores for _, given in show(trained, dataclasses.replace(run, views=second)) for p in given]
    after = [p.scores for view, given in show(trained, run) for p in given if view.sequence == 1]
    assert all(torch.equal(a, b) for a, b in zip(alone, after, strict=True))


def test_batches_are_spans_of_neighbours() -> None:
    batches = ActivationSequence().draw(10 * SPAN + 7, 3 * SPAN, torch.Generator().manual_seed(0))
    assert len(batches) == 3
    spans = torch.cat(batches).view(-1, SPAN)
    assert bool((spans.diff(dim=1) == 1).all()) and len(set(spans[:, 0].tolist())) == 9
