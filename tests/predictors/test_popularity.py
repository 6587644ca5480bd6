"""Popularity against a count made one token at a time in plain Python."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from predictors.popularity import Popularity
from prefetch.errors import ConfigError
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, make_run, show


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_scores_are_the_counts_so_far(decay: float) -> None:
    run = make_run(batch=2)
    counts: dict[int, list[float]] = defaultdict(lambda: [0.0] * N_EXPERTS)
    n_checked = 0
    for view, predictions in show(Popularity(lookahead=2, decay=decay), run):
        for token in view.topk_ids.tolist():
            counts[view.layer] = [count * decay for count in counts[view.layer]]
            for expert in token:
                counts[view.layer][expert] += 1.0
        targets = [(view.layer + d) % N_LAYERS for d in (1, 2)]
        assert [p.layer for p in predictions] == [t for t in targets if t in counts]
        for p in predictions:
            torch.testing.assert_close(p.scores, torch.tensor([counts[p.layer]]), rtol=1e-5, atol=1e-7)
            n_checked += 1
    assert n_checked > 2 * N_LAYERS


def test_counts_outlive_a_sequence() -> None:
    run = make_run(n_sequences=2)
    first_of_second = next(p for view, p in show(Popularity(), run) if view.sequence == 1)
    assert [p.layer for p in first_of_second] == [1]


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_refuses_an_impossible_decay(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"predictor.decay"):
        Popularity(decay=decay)
