"""Families that count: their scores against statistics taken anew from everything seen before, in plain Python."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch

from predictors.activation_matrix import ActivationMatrix
from predictors.base import LayerView, Predictor
from predictors.co_occurrence import CoOccurrence
from predictors.token_experts import TokenExperts
from prefetch.errors import ConfigError
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, TOP_K, make_run, show

RUN = make_run(n_sequences=3)


def before(view: LayerView, *, inclusive: bool) -> list[LayerView]:
    """What came before `view`, with it or without."""
    place = next(i for i, other in enumerate(RUN.views) if other is view)
    return RUN.views[: place + inclusive]


def test_co_occurrence_is_the_smoothed_conditional_frequency() -> None:
    for view, predictions in show(CoOccurrence(smoothing=0.5), RUN):
        for p in predictions:
            pairs: Counter = Counter()
            seen = before(view, inclusive=False)
            for here, there in zip(seen, seen[1:], strict=False):
                if here.layer == view.layer and there.layer == p.layer:
                    for row, then in zip(here.topk_ids.tolist(), there.topk_ids.tolist(), strict=True):
                        pairs.update((e, f) for e in row for f in then)
            for token, row in enumerate(view.topk_ids.tolist()):
                for f in range(N_EXPERTS):
                    shares = [(pairs[e, f] + 0.5) / (sum(pairs[e, g] for g in range(N_EXPERTS)) + 0.5 * N_EXPERTS) for e in row]
                    assert float(p.scores[token, f]) == pytest.approx(sum(shares) / TOP_K, rel=1e-5)


def test_token_experts_are_what_the_same_token_used() -> None:
    n_checked = 0
    for view, predictions in show(TokenExperts(lookahead=2), RUN):
        assert [p.layer for p in predictions] == [t for t in (view.layer + 1, view.layer + 2) if t < N_LAYERS]
        for p in predictions:
            own: defaultdict = defaultdict(Counter)
            everyone: Counter = Counter()
            for past in before(view, inclusive=True):
                if past.layer == p.layer:
                    for token, row in zip(past.token_ids.tolist(), past.topk_ids.tolist(), strict=True):
                        own[token].update(row)
                        everyone.update(row)
            for row, token in enumerate(view.token_ids.tolist()):
                for e in range(N_EXPERTS):
                    expected = own[token][e] + everyone[e] / (everyone.total() + 1)
                    assert float(p.scores[row, e]) == pytest.approx(expected, abs=1e-5)
                    n_checked += own[token][e] > 0
    assert n_checked > 20


def test_tokens_beyond_the_table_fall_back_to_popularity() -> None:
    predictor = TokenExperts(max_tokens=1)
    for view, predictions in show(predictor, RUN):
        known = int(RUN.views[0].token_ids[0])
        for p in predictions:
            others = p.scores[view.token_ids != known]
            assert bool((others < 1).all())
    assert len(predictor.row_of) == 1 and len(predictor.counts) == 1


def test_the_most_similar_past_sequence_is_found() -> None:
    """Two past sequences use disjoint experts; a third that begins like the first is told what the first used."""
    views = []
    for sequence, first in enumerate((0, 4, 0)):
        for step in range(3):
            for layer in range(N_LAYERS):
                ids = torch.tensor([[first + layer % 4, first + (layer + 1) % 4]])
                template = RUN.views[layer]
                row = torch.zeros(1, dtype=torch.int64)
                views.append(
                    LayerView(layer, step, sequence, template.hidden[:1], None, ids, torch.full((1, 2), 0.5), row)
                )  # fmt: skip
    predictor = ActivationMatrix(n_matches=1)
    predictor.bind(RUN.model)
    sequence = None
    for view in views:
        if view.sequence != sequence:
            predictor.start_sequence()
            sequence = view.sequence
        predictions = predictor.predict(view)
        if view.sequence == 0:
            assert not predictions
        elif view.sequence == 2:
            (p,) = predictions
            assert set(p.scores[0].topk(2).indices.tolist()) == {p.layer % 4, (p.layer + 1) % 4}


@torch.inference_mode()
def test_a_full_collection_replaces_what_is_most_alike() -> None:
    predictor = ActivationMatrix(capacity=2, n_matches=1)
    predictor.bind(RUN.model)

    def end_sequence(expert: int, other: int) -> None:
        predictor.running[0, expert], predictor.running[0, other] = 3, 1
        predictor.start_sequence()

    end_sequence(0, 1)
    end_sequence(4, 5)
    end_sequence(0, 2)
    used = [set(matrix.nonzero()[:, 0].tolist()) for matrix in predictor.matrices]
    assert used == [{0, 2}, {4, 5}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CoOccurrence(smoothing=0.0), "smoothing=0.0: it must be above 0"),
        (lambda: TokenExperts(max_tokens=0), "max_tokens=0: it must be at least 1"),
        (lambda: ActivationMatrix(n_matches=9, capacity=4), "predictor.n_matches=9"),
    ],
)
def test_impossible_knobs_are_named(make: type[Predictor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("family", [CoOccurrence, TokenExperts, ActivationMatrix])
def test_they_count_whether_or_not_in_inference_mode(family: type[Predictor]) -> None:
    """A run decodes in inference mode; costs are counted outside of it, after."""
    predictor, outside = family(), family()
    with torch.inference_mode():
        list(show(predictor, RUN))
    predictor.start_sequence()
    found = [p.scores for _, given in zip(range(8), show(predictor, RUN), strict=False) for p in given[1]]
    expected = [p.scores for _, given in zip(range(8), show(outside, RUN), strict=False) for p in given[1]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
