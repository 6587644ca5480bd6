"""Fate against its definition in NumPy, float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from predictors.fate import Fate
from predictors.gate_reuse import GateReuse
from prefetch.errors import ConfigError
from tests.predictors.synthetic_run import HIDDEN, N_EXPERTS, N_LAYERS, TOP_K, make_run, show


@pytest.mark.parametrize(("lookahead", "percentile"), [(1, 75.0), (2, 50.0), (1, 0.0), (1, 100.0)])
def test_candidates_are_the_k_best_and_those_above_the_percentile(lookahead: int, percentile: float) -> None:
    run, n_checked = make_run(batch=2), 0
    routers = [logits(torch.eye(HIDDEN)).T.double().numpy() for logits in run.model.router_logits]  # [E, H]
    for view, predictions in show(Fate(lookahead, percentile), run):
        for p in predictions:
            for hidden, scores in zip(view.hidden.double().numpy(), p.scores.double().numpy(), strict=True):
                powers = np.exp(routers[view.layer + lookahead] @ hidden)
                confidence = powers / powers.sum()
                ranked = np.argsort(-confidence)
                threshold = np.percentile(confidence, percentile)
                candidates = set(ranked[:TOP_K]) | {e for e in range(N_EXPERTS) if confidence[e] > threshold * (1 + 1e-6)}
                assert set(np.flatnonzero(np.isfinite(scores))) == candidates
                np.testing.assert_allclose(scores[list(candidates)], confidence[list(candidates)], rtol=1e-4)
                n_checked += 1
    assert n_checked > 50


def test_without_a_percentile_it_is_gate_reuse_with_this_layers_norm() -> None:
    made = make_run()
    gains = [0.5 + torch.rand(HIDDEN, generator=torch.Generator().manual_seed(layer)) for layer in range(N_LAYERS)]
    norms = [lambda residual, gain=gain: torch.nn.functional.rms_norm(residual, (HIDDEN,), gain) for gain in gains]
    views = [dataclasses.replace(view, hidden=norms[view.layer](view.residual)) for view in made.views]
    observed = dataclasses.replace(made, model=dataclasses.replace(made.model, pre_moe_norm=norms), views=views)
    n_different = 0
    for target in range(1, N_LAYERS):
        norm_of_before = [norms[target - 1]] * N_LAYERS
        same_norm = dataclasses.replace(observed, model=dataclasses.replace(made.model, pre_moe_norm=norm_of_before))
        pairs = zip(
            show(Fate(percentile=None), observed), show(GateReuse(), same_norm), show(GateReuse(), observed), strict=True
        )
        for (view, fate), (_, same), (_, targets) in pairs:
            if view.layer + 1 == target:
                torch.testing.assert_close(fate[0].scores, same[0].scores.softmax(1), rtol=1e-4, atol=1e-6)
                n_different += not torch.equal(fate[0].scores.argsort(1), targets[0].scores.argsort(1))
    assert n_different > 0


@pytest.mark.parametrize("percentile", [-1.0, 101.0])
def test_refuses_an_impossible_percentile(percentile: float) -> None:
    with pytest.raises(ConfigError, match=rf"predictor.percentile={percentile}: it must be from 0 to 100"):
        Fate(percentile=percentile)
