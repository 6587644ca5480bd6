"""Previous token against a search backwards through the sequence."""

from __future__ import annotations

import pytest
import torch

from predictors.base import LayerView
from predictors.previous_token import PreviousToken
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, PROMPT, TOP_K, Run, make_run, show

LOOKAHEAD = 3


def most_recent_first(run: Run, until: LayerView, target: int, row: int, batch: int) -> list[int]:
    """Experts that sequence `row` of the batch used at layer `target` up to and including `until`, latest first."""
    tokens: list[list[int]] = []
    for view in run.views:
        if view.sequence == until.sequence and view.layer == target:
            tokens += view.topk_ids.tolist() if view.step == 0 else [view.topk_ids[row].tolist()]
        if view is until:
            break
    return list(dict.fromkeys(expert for token in reversed(tokens) for expert in token))


@pytest.mark.parametrize("batch", [1, 3])
def test_ranks_experts_by_how_recently_the_sequence_used_them(batch: int) -> None:
    run = make_run(batch=batch)
    n_checked = 0
    for view, predictions in show(PreviousToken(LOOKAHEAD), run):
        for p in predictions:
            for row, scores in enumerate(p.scores):
                ranked = scores.argsort(descending=True, stable=True).tolist()
                used = [expert for expert in ranked if scores[expert] != -torch.inf]
                assert used == most_recent_first(run, view, p.layer, row, batch)
                n_checked += 1
    assert n_checked > 0


def test_its_best_guesses_are_the_previous_tokens_experts() -> None:
    run = make_run()
    routed = {(v.sequence, v.step, v.layer): v.topk_ids[-1].tolist() for v in run.views}
    for view, predictions in show(PreviousToken(1), run):
        for p in predictions:
            previous = view.step - 1 if p.layer > view.layer else view.step
            assert p.scores[0].topk(TOP_K).indices.tolist() == routed[view.sequence, previous, p.layer]


def test_knows_nothing_of_layers_a_new_sequence_has_not_reached() -> None:
    for view, predictions in show(PreviousToken(LOOKAHEAD), make_run()):
        if view.step == 0:
            assert all(p.layer <= view.layer for p in predictions)


def test_a_batch_that_changes_its_size_keeps_what_it_shares() -> None:
    run = make_run()
    predictor = PreviousToken()
    predictor.bind(run.model)
    for n_tokens, step in ((PROMPT, 0), (3, 1), (2, 2)):
        ids = torch.arange(n_tokens * TOP_K).reshape(n_tokens, TOP_K) % N_EXPERTS
        for layer in range(N_LAYERS):
            view = LayerView(layer, step, 0, ids, None, ids, ids, ids[:, 0])
            predictions = predictor.predict(view)
    assert predictions[0].scores.shape == (2, N_EXPERTS)
    assert predictions[0].scores.argsort(descending=True)[:, :TOP_K].tolist() == ids.tolist()
