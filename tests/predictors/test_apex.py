"""APEX: it is distilled from the router, names more experts where it doubts, and its confidence is what happens."""

from __future__ import annotations

import dataclasses
from math import exp, log

import pytest
import torch

from predictors.apex import Apex, DistilledRouter, extra_needed
from predictors.fitting import FitOptions, fit, rows_of
from predictors.learned import Truth
from prefetch.errors import ConfigError
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, TOP_K, Run, make_run, views_per_layer

MAX_EXTRA = 3


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(n_sequences=120)


@pytest.fixture(scope="module")
def trained(run: Run) -> Apex:
    predictor, views = Apex(max_extra=MAX_EXTRA), views_per_layer(run)
    fit(predictor, run.model, views, views, FitOptions(epochs=25, batch_rows=64, learning_rate=1e-2, patience=25))
    return predictor


def test_the_loss_is_its_formula(run: Run) -> None:
    random = torch.Generator().manual_seed(2)
    router, given = torch.randn(9, N_EXPERTS, generator=random), torch.randn(9, N_EXPERTS, generator=random)
    predictor = Apex(max_extra=MAX_EXTRA)
    predictor.use(run.model)
    predictor.network = predictor.build()
    head = predictor.network.heads["1"]
    torch.nn.init.normal_(head.steps, generator=random)
    torch.nn.init.normal_(head.first, generator=random)
    ids, w, theta = router.topk(TOP_K).indices, head.doubt.weight[0].tolist(), head.first.tolist()
    for step in head.steps.tolist():
        theta.append(theta[-1] + log(1 + exp(step)))
    divergence, entropy = 0.0, []
    for logits, scores, chosen in zip(router.double(), given.double(), ids.tolist(), strict=True):
        p = logits.softmax(0)
        divergence += float((p * (p.log() - scores.softmax(0).log())).sum())
        best = sorted(scores.tolist(), reverse=True)
        boundary = (best[TOP_K - 1] + best[TOP_K]) / 2
        doubt = sum(a * (b - boundary) for a, b in zip(w, best, strict=True))
        missing = max(best.index(float(scores[expert])) for expert in chosen) + 1 - TOP_K
        for d, threshold in enumerate(theta):
            enough = 1 / (1 + exp(doubt - threshold))
            entropy.append(-log(enough if missing <= d else 1 - enough))
    found = predictor.loss(given, Truth(1, router, ids, router.topk(TOP_K).values.softmax(-1)))
    assert float(found.detach()) == pytest.approx(divergence / 9 + sum(entropy) / len(entropy), rel=1e-5)


def test_extra_needed_is_how_far_down_the_last_true_expert_stands() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert extra_needed(logits, torch.tensor([[1, 0], [0, 3], [2, 1]])).tolist() == [0, 2, 1]


def test_it_learns_the_router_and_how_sure_it_is(trained: Apex, run: Run) -> None:
    """Of rows where it claims to cover all true experts with its confidence, that share does, within the noise of the rows."""
    n_trained_on = len(run.trace.token_ids)
    longer = views_per_layer(make_run(n_sequences=240))  # begins as `run` does
    fresh = [rows_of(view, slice(n_trained_on, None)) for view in longer]
    truth = {layer: fresh[layer].topk_ids for layer in range(N_LAYERS)}
    covered, claimed, named = [], [], []
    with torch.no_grad():
        for layer, scores in trained.logits(fresh).items():
            head = trained.network.heads[str(layer)]
            finite = ~scores.isneginf()
            raw = head.map(fresh[layer].pre_attention)
            covered.append(finite.gather(1, truth[layer]).all(1))
            n_named = finite.sum(1)
            claimed.append(
                head.enough(raw.sort(dim=1, descending=True).values).sigmoid().gather(1, (n_named - TOP_K)[:, None])[:, 0]
            )
            named.append(n_named)
            assert torch.equal(scores[finite], raw[finite])
    claims, facts, counts = torch.cat(claimed), torch.cat(covered).float(), torch.cat(named)
    assert float(facts.mean()) == pytest.approx(float(claims.mean()), abs=0.03)
    assert bool(((claims >= trained.confidence) | (counts == TOP_K + MAX_EXTRA)).all())
    assert int(counts.min()) >= TOP_K and int(counts.max()) <= TOP_K + MAX_EXTRA and counts.unique().numel() > 1


def test_more_confidence_names_more(trained: Apex, run: Run) -> None:
    view = views_per_layer(run)[1]
    head = trained.network.heads["1"]
    counts = []
    for confidence in (0.05, 0.5, 0.9, 0.999):
        changed = DistilledRouter(run.model, MAX_EXTRA, confidence)
        changed.load_state_dict(head.state_dict())
        counts.append((~changed.eval()(view).isneginf()).sum(1))
    assert all(bool((fewer <= more).all()) for fewer, more in zip(counts, counts[1:], strict=False))
    assert float(counts[0].float().mean()) < float(counts[-1].float().mean())


def test_without_extra_experts_it_names_k(run: Run) -> None:
    predictor, views = Apex(max_extra=0), views_per_layer(run)
    fit(predictor, run.model, views, views, FitOptions(epochs=1, batch_rows=64))
    with torch.no_grad():
        assert all(bool(((~scores.isneginf()).sum(1) == TOP_K).all()) for scores in predictor.logits(views).values())


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"max_extra": -1}, "predictor.max_extra=-1: it must be from 0 to 6"),
        ({"max_extra": 7}, "predictor.max_extra=7: it must be from 0 to 6"),
        ({"confidence": 1.0}, "predictor.confidence=1.0: it must be between 0 and 1"),
        ({"confidence": 0.0}, "predictor.confidence=0.0: it must be between 0 and 1"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, float], said: str, run: Run) -> None:
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(Apex(), **knobs).use(run.model)
