"""The oracle: exact at accuracy 1, as wrong as asked below it, and no help at all on a run it did not record."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from predictors.oracle import Oracle
from prefetch.errors import ConfigError, TraceError
from tests.predictors.synthetic_run import DECODED, N_EXPERTS, N_LAYERS, TOP_K, Run, make_run, show


def routing_of(run: Run) -> dict[tuple[int, int, int], torch.Tensor]:
    return {(v.sequence, v.step, v.layer): v.topk_ids for v in run.views}


@pytest.mark.parametrize("lookahead", [1, 3, N_LAYERS])
def test_reproduces_the_recorded_routing(lookahead: int) -> None:
    run = make_run()
    routed = routing_of(run)
    for view, predictions in show(Oracle(lookahead=lookahead), run):
        reached = [divmod(view.layer + d, N_LAYERS) for d in range(1, lookahead + 1)]
        coming = [(view.step + passes, layer) for passes, layer in reached if view.step + passes <= DECODED]
        assert [p.layer for p in predictions] == [layer for _, layer in coming]
        for p, (step, layer) in zip(predictions, coming, strict=True):
            assert torch.equal(p.scores.topk(TOP_K).indices, routed[view.sequence, step, layer])
            assert ((p.scores != -torch.inf).sum(-1) == TOP_K).all()


def test_from_a_prefill_to_a_batch_it_ranks_by_how_many_sequences_want_the_expert() -> None:
    run = make_run(batch=3)
    routed = routing_of(run)
    n_checked = 0
    for view, predictions in show(Oracle(), run):
        if view.step == 0 and view.layer == N_LAYERS - 1:
            wanted = torch.bincount(routed[view.sequence, 1, 0].reshape(-1), minlength=N_EXPERTS)
            scores = predictions[0].scores
            assert scores.shape == (1, N_EXPERTS)
            assert torch.equal(scores[0].clamp(min=0), wanted.float())
            assert torch.equal(scores[0] == -torch.inf, wanted == 0)
            n_checked += 1
    assert n_checked == 2


def recall(accuracy: float, seed: int, run: Run) -> float:
    """Share of the true experts among those the oracle names."""
    routed = routing_of(run)
    n_found = n_true = 0
    for view, predictions in show(Oracle(accuracy=accuracy, seed=seed), run):
        for p in predictions:
            true = routed[view.sequence, view.step + (p.layer <= view.layer), p.layer]
            assert ((p.scores != -torch.inf).sum(-1) == TOP_K).all(), "it always names k experts, none twice"
            if len(p.scores) == len(true):
                n_found += int((p.scores.gather(1, true) != -torch.inf).sum())
                n_true += true.numel()
    return n_found / n_true


@pytest.fixture(scope="module")
def long_run() -> Run:
    """About 13,000 true experts: one standard deviation of a recall is at most 0.0044."""
    return make_run(n_sequences=150)


@pytest.mark.parametrize("accuracy", [0.0, 0.7])
def test_its_recall_is_its_accuracy(long_run: Run, accuracy: float) -> None:
    assert recall(accuracy, 0, long_run) == pytest.approx(accuracy, abs=0.016)


def test_its_mistakes_are_uniform_over_wrong_experts(long_run: Run) -> None:
    oracle = Oracle(accuracy=0.0)
    oracle.use_trace(long_run.trace)
    oracle.bind(long_run.model)
    # A wrong expert of n_wrong = E - k is named with probability k / n_wrong, whichever it is.
    for true, guessed in zip(oracle.true_ids, oracle.guessed_ids, strict=True):
        could_be_wrong = len(true) - torch.bincount(true.reshape(-1), minlength=N_EXPERTS)
        named = torch.bincount(guessed.reshape(-1), minlength=N_EXPERTS) / could_be_wrong
        torch.testing.assert_close(named, torch.full((N_EXPERTS,), TOP_K / (N_EXPERTS - TOP_K)), rtol=0, atol=0.06)


def test_the_seed_decides_the_mistakes() -> None:
    run = make_run()

    def scores(seed: int) -> list[torch.Tensor]:
        return [p.scores for _, predictions in show(Oracle(accuracy=0.5, seed=seed), run) for p in predictions]

    assert all(map(torch.equal, scores(1), scores(1)))
    assert not all(map(torch.equal, scores(1), scores(2)))


def shown_other(trace_of: Run, run: Run) -> None:
    oracle = Oracle()
    for _ in show(oracle, dataclasses.replace(run, trace=trace_of.trace)):
        pass


def test_refuses_a_trace_that_ends_before_the_run() -> None:
    with pytest.raises(TraceError, match="ends before the run: it lacks sequence 1, step 0"):
        shown_other(make_run(n_sequences=1), make_run(n_sequences=2))


def test_refuses_a_trace_of_other_tokens() -> None:
    run = make_run()
    run.trace.token_ids[-1] += 1
    with pytest.raises(TraceError, match=f"other tokens at sequence 1, step {DECODED}"):
        shown_other(run, run)


def test_refuses_a_trace_of_a_model_that_routes_differently() -> None:
    run = make_run()
    run.trace.topk_ids[0, 0] = run.trace.topk_ids[0, 0, ::-1].copy()
    with pytest.raises(TraceError, match="another model: layer 0 routed differently at sequence 0, step 0"):
        shown_other(run, run)


def test_refuses_a_trace_of_a_model_of_other_sizes() -> None:
    run = make_run()
    trace = dataclasses.replace(
        run.trace,
        topk_ids=np.ascontiguousarray(run.trace.topk_ids[:, 1:]),
        topk_weights=np.ascontiguousarray(run.trace.topk_weights[:, 1:]),
        guesses={},
        resident={},
    )
    with pytest.raises(TraceError, match=r"is \(3, 8, 2\), not \(4, 8, 2\)"):
        shown_other(dataclasses.replace(run, trace=trace), run)


def test_needs_a_trace() -> None:
    with pytest.raises(ConfigError, match="needs the routing trace"):
        Oracle().bind(make_run().model)


def test_refuses_an_impossible_accuracy() -> None:
    with pytest.raises(ConfigError, match=r"predictor.accuracy=1.2"):
        Oracle(accuracy=1.2)


def test_cannot_be_wrong_where_hardly_any_expert_is() -> None:
    run = make_run()
    trace = dataclasses.replace(run.trace, topk_ids=run.trace.topk_ids % 3, n_experts=3, guesses={}, resident={})
    oracle = Oracle(accuracy=0.5)
    oracle.use_trace(trace)
    with pytest.raises(ConfigError, match="too few wrong ones"):
        oracle.bind(dataclasses.replace(run.model, n_experts=3))
