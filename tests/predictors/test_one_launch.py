"""Trained heads by their kernels, in Triton's interpreter, say what their networks say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from predictors.corrected_gate import CorrectedGate
from predictors.learned import LearnedPredictor
from predictors.pre_gate import PreGate
from predictors.prescope import PreScope
from tests.predictors.synthetic_run import N_LAYERS, make_run, show

EPSILON = torch.finfo(torch.float32).eps  # of the synthetic run's norms


def trained(predictor: LearnedPredictor, batch: int = 1) -> tuple[LearnedPredictor, list]:
    """`predictor`, trained on the run, whose norms are known, and what it says of each view."""
    run = make_run(batch=batch)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, norm_epsilon=EPSILON))
    return predictor, list(show(predictor, run))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda: PreScope(outer_rank=8, middle_rank=8, width=24),
        lambda: PreScope(outer_rank=8, middle_rank=8, width=24, input_layers=0, output_layers=0),
        lambda: CorrectedGate(rank=4, width=6),
    ],
    ids=["prescope", "prescope, middle heads alone", "corrected gate"],
)
def test_kernels_say_what_the_network_says(make, batch: int) -> None:
    predictor, said = trained(make(), batch)
    predictor.one_launch = predictor.launches()
    assert set(predictor.one_launch) == set(range(1, N_LAYERS))
    for view, predictions in said[
        : (5 if batch == 1 else 2) * N_LAYERS
    ]:  # a prompt, then decoded tokens, whose launches are repeated
        again = predictor.predict(view)
        assert [p.layer for p in again] == [p.layer for p in predictions]
        for mine, network in zip(again, predictions, strict=True):
            torch.testing.assert_close(mine.scores, network.scores, rtol=1e-4, atol=1e-4)


def test_scores_that_were_handed_out_do_not_change() -> None:
    predictor, said = trained(PreScope(outer_rank=8, middle_rank=8, width=16))
    predictor.one_launch = predictor.launches()
    views = [view for view, _ in said if view.layer == 0 and view.step > 0][:3]
    scores = [predictor.predict(view)[0].scores for view in views]
    copies = [s.clone() for s in scores]
    predictor.predict(views[0])
    assert all(map(torch.equal, scores, copies)) and not torch.equal(scores[0], scores[1])


def test_what_the_kernels_do_not_know_is_left_to_the_network() -> None:
    predictor, _ = trained(CorrectedGate(rank=4, width=6))
    predictor.model = dataclasses.replace(predictor.model, norm_epsilon=None)
    assert predictor.launches() == {}
    assert trained(PreScope(outer_rank=8, middle_rank=8, width=16, online_threshold=0.5))[0].launches() == {}
    assert trained(PreGate())[0].launches() == {}


def test_without_a_gpu_the_network_computes() -> None:
    assert trained(PreScope(outer_rank=8, middle_rank=8, width=16))[0].one_launch == {}
