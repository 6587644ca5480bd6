"""Co-occurrence against naive Bayes over frequencies counted one token at a time in plain Python."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from predictors.co_occurrence import CoOccurrence
from prefetch.errors import ConfigError
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, TOP_K, make_run, show

Counts = dict[tuple[int, int], float]  # (expert at the observing layer, expert at the target) -> tokens


def conditional(counts: Counts, before: int, expert: int, prior: float) -> float:
    """Laplace-smoothed P(expert | before): k experts follow each, so that a row of them adds up to k."""
    total = sum(counts[before, other] + prior for other in range(N_EXPERTS))
    return TOP_K * (counts[before, expert] + prior) / total


def unconditional(counts: Counts, expert: int, prior: float) -> float:
    """Laplace-smoothed P(expert)."""
    everything = sum(counts[e, f] + prior for e in range(N_EXPERTS) for f in range(N_EXPERTS))
    return TOP_K * sum(counts[e, expert] + prior for e in range(N_EXPERTS)) / everything


def naive_bayes(counts: Counts, used: list[int], expert: int, prior: float) -> float:
    """P(expert) times the likelihood ratios of all that were used, as if they were independent."""
    marginal = unconditional(counts, expert, prior)
    return math.log(marginal * math.prod(conditional(counts, e, expert, prior) / marginal for e in used))


@pytest.mark.parametrize(("lookahead", "prior", "decay", "batch"), [(1, 0.5, 1.0, 1), (2, 0.1, 1.0, 3), (1, 2.0, 0.7, 2)])
def test_scores_are_those_of_naive_bayes(lookahead: int, prior: float, decay: float, batch: int) -> None:
    run, n_checked = make_run(batch=batch), 0
    routed = {(view.sequence, view.step, view.layer): view.topk_ids.tolist() for view in run.views}
    counts: dict[int, Counts] = defaultdict(lambda: defaultdict(float))
    for view, predictions in show(CoOccurrence(lookahead, prior, decay), run):
        now = routed[view.sequence, view.step, view.layer]
        if view.layer >= lookahead:
            for used, followed in zip(routed[view.sequence, view.step, view.layer - lookahead], now, strict=True):
                of_layer = counts[view.layer]
                for pair in of_layer:
                    of_layer[pair] *= decay
                for e in used:
                    for f in followed:
                        of_layer[e, f] += 1.0
        target = view.layer + lookahead
        assert [p.layer for p in predictions] == ([target] if target in counts else [])
        for p in predictions:
            expected = torch.tensor([[naive_bayes(counts[target], used, f, prior) for f in range(N_EXPERTS)] for used in now])
            differences = [scores - scores[:, :1] for scores in (p.scores, expected)]
            torch.testing.assert_close(*differences, rtol=1e-4, atol=1e-4)
            n_checked += 1
    assert n_checked > N_LAYERS


@pytest.mark.parametrize("knobs", [{"prior": 0.0}, {"decay": 0.0}, {"decay": 1.1}])
def test_refuses_impossible_knobs(knobs: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"predictor.{next(iter(knobs))}="):
        CoOccurrence(**knobs)
