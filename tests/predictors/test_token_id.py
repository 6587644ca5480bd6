"""Token id against frequencies counted one token at a time in plain Python."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from predictors.token_id import TokenId
from prefetch.errors import ConfigError
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, make_run, show


@pytest.mark.parametrize(("lookahead", "prior", "batch"), [(1, 4.0, 1), (3, 0.5, 3)])
def test_scores_are_frequencies_per_token_backed_off_to_those_of_all(lookahead: int, prior: float, batch: int) -> None:
    run, n_checked, n_known = make_run(n_sequences=6, batch=batch), 0, 0
    used: Counter[tuple[int, int, int]] = Counter()  # (layer, token, expert)
    occurred: Counter[tuple[int, int]] = Counter()  # (layer, token)
    for view, predictions in show(TokenId(lookahead, prior), run):
        tokens = view.token_ids.tolist()
        for token, experts in zip(tokens, view.topk_ids.tolist(), strict=True):
            occurred.update([(view.layer, token), (view.layer, -1)])  # -1: any token
            used.update((view.layer, who, expert) for expert in experts for who in (token, -1))
        coming = [t for t in range(view.layer + 1, view.layer + 1 + lookahead) if t < N_LAYERS and occurred[t, -1]]
        assert [p.layer for p in predictions] == coming
        for p in predictions:
            expected = [
                [
                    (used[p.layer, x, e] + prior * used[p.layer, -1, e] / occurred[p.layer, -1])
                    / (occurred[p.layer, x] + prior)
                    for e in range(N_EXPERTS)
                ]
                for x in tokens
            ]
            torch.testing.assert_close(p.scores, torch.tensor(expected), rtol=1e-5, atol=1e-6)
            n_checked += 1
            n_known += sum(occurred[p.layer, x] > 0 for x in tokens)
    assert n_checked > 6 * N_LAYERS and n_known > 20


def test_memory_follows_the_tokens_seen_and_not_the_vocabulary() -> None:
    run = make_run(n_sequences=6)
    views = [replace(view, token_ids=3000 * view.token_ids) for view in run.views]  # ids as large as a real vocabulary's
    predictor = TokenId()
    for _ in show(predictor, replace(run, views=views)):
        pass
    n_seen = len(torch.cat([view.token_ids for view in views]).unique())
    assert n_seen == predictor.n_rows <= len(predictor.used) <= 2 * n_seen


def test_refuses_a_prior_of_zero() -> None:
    with pytest.raises(ConfigError, match=r"predictor.prior=0.0: it must be above 0"):
        TokenId(prior=0.0)
