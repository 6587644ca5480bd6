"""Learning while running: it begins at the threshold, helps where the text has changed, and leaves the trained weights alone."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from predictors.fitting import FitOptions, fit
from predictors.prescope import PreScope
from prefetch.errors import ConfigError
from tests.predictors.synthetic_run import Run, make_run, show, views_per_layer

SMALL = {"outer_rank": 8, "middle_rank": 16, "width": 32, "online_window": 16, "online_learning_rate": 1e-2}


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(n_sequences=30)


@pytest.fixture(scope="module")
def trained(run: Run) -> PreScope:
    predictor = PreScope(**SMALL)
    fit(predictor, run.model, views_per_layer(run), views_per_layer(make_run(8, seed=1)), FitOptions(epochs=4, batch_rows=32))
    return predictor


def with_threshold(trained: PreScope, threshold: float | None) -> PreScope:
    predictor = PreScope(**SMALL, online_threshold=threshold)
    predictor.network = copy.deepcopy(trained.network)
    return predictor


def recall(predictor: PreScope, run: Run, last: int) -> float:
    """Recall@k of the guesses for the last `last` layer calls."""
    found, guesses = [], {}
    for view, predictions in show(predictor, run):
        if view.layer in guesses:
            best = guesses.pop(view.layer).topk(2).indices
            found.append((view.topk_ids[:, :, None] == best[:, None, :]).any(-1).float().mean())
        guesses |= {p.layer: p.scores for p in predictions}
    return float(torch.stack(found[-last:]).mean())


def routed_elsewhere(run: Run) -> Run:
    """The same states, but every expert has exchanged its place with another: what was learned is wrong."""
    views = [dataclasses.replace(view, topk_ids=(view.topk_ids + 3) % 8) for view in run.views]
    return dataclasses.replace(run, views=views)


def test_below_the_threshold_nothing_is_learned(trained: PreScope, run: Run) -> None:
    strict, never = with_threshold(trained, 1.0), with_threshold(trained, None)
    pairs = zip(show(strict, run), show(never, run), strict=True)
    assert all(torch.equal(a.scores, b.scores) for (_, ours), (_, theirs) in pairs for a, b in zip(ours, theirs, strict=True))
    assert strict.online is not None and strict.online.n_updates == 0


def test_updates_are_at_most_one_a_window_and_layer(trained: PreScope, run: Run) -> None:
    predictor = with_threshold(trained, 0.0)
    list(show(predictor, run))
    n_tokens = len(views_per_layer(run)[0].token_ids)
    assert predictor.online is not None
    assert 0 < predictor.online.n_updates <= 3 * (n_tokens // SMALL["online_window"])


def test_it_adapts_where_routing_has_changed(trained: PreScope, run: Run) -> None:
    elsewhere = routed_elsewhere(run)
    kept, learning = (recall(with_threshold(trained, threshold), elsewhere, 200) for threshold in (None, 0.1))
    assert learning > kept + 0.2


def test_a_fresh_bind_forgets_what_was_learned(trained: PreScope, run: Run) -> None:
    predictor = with_threshold(trained, 0.0)
    list(show(predictor, run))
    assert predictor.online is not None
    learned = predictor.online.network.state_dict()
    before = trained.network.state_dict()
    assert any(not torch.equal(learned[name], before[name]) for name in before)
    predictor.bind(run.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in predictor.network.state_dict().items())


def test_it_learns_in_inference_mode(trained: PreScope, run: Run) -> None:
    predictor = with_threshold(trained, 0.0)
    predictor.bind(run.model)
    with torch.inference_mode():
        for view in run.views:
            states = {name: getattr(view, name).clone() for name in ("hidden", "topk_weights", "topk_ids")}
            predictor.predict(dataclasses.replace(view, **states))
    assert predictor.online is not None and predictor.online.n_updates > 0


def test_weights_do_not_depend_on_what_is_learned_while_running(trained: PreScope) -> None:
    assert with_threshold(trained, 0.3).knobs() == with_threshold(trained, None).knobs()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"online_threshold": 1.5}, "online_threshold=1.5: it must be from 0 to 1"),
        ({"online_window": 0}, "online_window=0 must be"),
    ],
)
def test_impossible_knobs_are_named(knobs: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreScope(**knobs)
