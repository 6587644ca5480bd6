"""Top-m: its promises for any scores and any state of the fast tier, and its choices against a plain definition."""

from __future__ import annotations

from collections import Counter

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from predictors.base import Prediction
from prefetch.errors import ConfigError
from prefetch.geometry import ExpertGeometry, ExpertKey, MoEGeometry
from prefetch.planner.base import FastTierView
from prefetch.planner.top_m import TopM, likeliest

N_EXPERTS = 6
GEOMETRY = MoEGeometry(4, N_EXPERTS, 2, ExpertGeometry(32, 16, torch.float32))
ROW_BYTES = GEOMETRY.expert.row_bytes

# Few distinct values, so that ties and "never" are common.
FEW_VALUES = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0])
SHAPES = st.tuples(st.integers(1, 4), st.just(N_EXPERTS))
SCORES = hnp.arrays(np.float32, SHAPES, elements=FEW_VALUES).map(torch.from_numpy)
LAYERS = st.lists(st.integers(0, GEOMETRY.n_layers - 1), unique=True, max_size=3)
KEYS = st.builds(ExpertKey, st.integers(0, GEOMETRY.n_layers - 1), st.integers(0, N_EXPERTS - 1))


@st.composite
def predictions(draw: st.DrawFn) -> list[Prediction]:
    return [Prediction(layer, draw(SCORES)) for layer in draw(LAYERS)]


@st.composite
def planners(draw: st.DrawFn) -> TopM:
    m, bound = draw(st.none() | st.integers(1, 9)), draw(st.none() | st.integers(1, 5))
    planner = TopM(m, extra=draw(st.integers(0, 2)), max_queued_experts=bound)
    planner.bind(GEOMETRY)
    return planner


def by_definition(scores: torch.Tensor, m: int) -> list[int]:
    """Votes of each row's m best, then best score, then id; in plain Python."""
    votes: Counter[int] = Counter()
    for row in scores.tolist():
        best_first = sorted(range(len(row)), key=lambda e: (-row[e], e))
        votes.update(e for e in best_first[:m] if row[e] != float("-inf"))
    return sorted(votes, key=lambda e: (-votes[e], -max(row[e] for row in scores.tolist()), e))


@given(SCORES, st.integers(1, N_EXPERTS))
@settings(deadline=None)
def test_ranks_by_votes_then_score_then_id(scores: torch.Tensor, m: int) -> None:
    assert likeliest(scores, m) == by_definition(scores, m)


@given(planners(), predictions(), st.sets(KEYS), st.integers(0, 12), st.integers(0, 6 * ROW_BYTES))
@settings(max_examples=200, deadline=None)
def test_takes_the_best_that_fit_and_nothing_else(
    planner: TopM, predicted: list[Prediction], on_board: set[ExpertKey], free_slots: int, queued_bytes: int
) -> None:
    plan = planner.plan(predicted, FastTierView(on_board.__contains__, free_slots, queued_bytes))

    assert len(set(plan)) == len(plan) <= free_slots
    assert not on_board.intersection(plan)
    if planner.max_queued_experts is not None and plan:
        assert queued_bytes + len(plan) * ROW_BYTES <= planner.max_queued_experts * ROW_BYTES
    per_token = min((planner.m or GEOMETRY.top_k) + planner.extra, N_EXPERTS)
    wanted = [ExpertKey(p.layer, e) for p in predicted for e in by_definition(p.scores, per_token)]
    unbounded = [key for key in wanted if key not in on_board]
    assert plan == unbounded[: len(plan)], "nearest layer first, then likeliest"
    if len(plan) < min(len(unbounded), free_slots):
        assert planner.max_queued_experts is not None, "it stopped early without a reason"
        assert queued_bytes + (len(plan) + 1) * ROW_BYTES > planner.max_queued_experts * ROW_BYTES


def test_m_is_the_models_top_k_unless_given() -> None:
    scores = torch.arange(N_EXPERTS).float().unsqueeze(0)
    everything_free = FastTierView(lambda key: False, 10, 0)
    for planner, expected in ((TopM(), [5, 4]), (TopM(1), [5]), (TopM(extra=1), [5, 4, 3]), (TopM(1, extra=1), [5, 4])):
        planner.bind(GEOMETRY)
        assert planner.plan([Prediction(2, scores)], everything_free) == [ExpertKey(2, e) for e in expected]


@pytest.mark.parametrize(("option", "value"), [("m", 0), ("extra", -1), ("max_queued_experts", 0)])
def test_refuses_impossible_knobs(option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"planner.{option}={value}: it must be at least"):
        TopM(**{option: value})


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_refuses_what_is_no_share(share: float) -> None:
    with pytest.raises(ConfigError, match=f"planner.min_useful_share={share}: it must be a share, from 0 to 1"):
        TopM(min_useful_share=share)


def test_holds_back_while_prefetches_are_mostly_wasted_and_says_what_it_would_have_done() -> None:
    planner = TopM(min_useful_share=0.4)
    planner.bind(MoEGeometry(4, 8, 2, ExpertGeometry(16, 16, torch.float32)))
    guess = [Prediction(1, torch.arange(8.0)[None])]
    considered: list[ExpertKey] = []
    poor, good = (FastTierView(lambda key: False, 4, 0, share, considered.append) for share in (0.39, 0.4))
    best = [ExpertKey(1, 7), ExpertKey(1, 6)]
    assert planner.plan(guess, good) == best and not considered
    assert planner.plan(guess, poor) == [] and considered == best
