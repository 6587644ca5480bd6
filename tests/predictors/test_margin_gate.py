"""The margin gate: it starts as gate reuse, is taught the order around the boundary of selection, and uses what was routed here."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from predictors.fitting import FitOptions, fit
from predictors.gate_reuse import GateReuse
from predictors.learned import Truth
from predictors.margin_gate import MarginGate, MarginHead
from prefetch.errors import ConfigError
from tests.predictors.synthetic_run import HIDDEN, N_EXPERTS, N_LAYERS, TOP_K, Run, make_run, show, views_per_layer


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(n_sequences=24)


@pytest.mark.parametrize("lookahead", [1, 3])
def test_untrained_it_is_gate_reuse(lookahead: int, run: Run) -> None:
    untrained = MarginGate(lookahead)
    views = views_per_layer(run)
    fit(untrained, run.model, views, views, FitOptions(epochs=1, batch_rows=32, learning_rate=1e-12, weight_decay=0.0))
    for (_, ours), (_, theirs) in zip(show(untrained, run), show(GateReuse(lookahead), run), strict=True):
        assert [p.layer for p in ours] == [p.layer for p in theirs]
        for mine, reused in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.scores, reused.scores, rtol=1e-3, atol=1e-4)


def test_the_head_is_its_formula(run: Run) -> None:
    random = torch.Generator().manual_seed(3)
    head = MarginHead(run.model, width=5).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=random)
    view = views_per_layer(run)[1]
    found = MarginHead(run.model, width=5)
    found.load_state_dict({name: tensor.float() for name, tensor in head.state_dict().items()})
    for row in range(5):
        h = view.hidden[row].double()
        w = torch.zeros(N_EXPERTS, dtype=torch.float64)
        for expert, weight in zip(view.topk_ids[row].tolist(), view.topk_weights[row].tolist(), strict=True):
            w[expert] = weight
        (g, u), (b, a) = head.read.weight.split([N_EXPERTS, 5]), head.read.bias.split([N_EXPERTS, 5])
        d, v = head.add.weight.split([N_EXPERTS, 5], dim=1)
        expected = g @ h + d @ w + v @ (u @ h + a).clamp_min(0) + b
        torch.testing.assert_close(found(view)[row].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_loss_is_cross_entropy_towards_softened_margins(run: Run) -> None:
    random = torch.Generator().manual_seed(2)
    router, head = torch.randn(9, N_EXPERTS, generator=random), torch.randn(9, N_EXPERTS, generator=random)
    predictor = MarginGate(temperature=0.5)
    predictor.use(run.model)
    chosen = router.topk(TOP_K)
    terms = []
    for logits, scores in zip(router.double().tolist(), head.double().tolist(), strict=True):
        kth, next_best = sorted(logits, reverse=True)[TOP_K - 1 : TOP_K + 1]
        for logit, score in zip(logits, scores, strict=True):
            wanted = 1 / (1 + math.exp(-(logit - (kth + next_best) / 2) / 0.5))
            p = 1 / (1 + math.exp(-score))
            terms.append(-wanted * math.log(p) - (1 - wanted) * math.log(1 - p))
    found = predictor.loss(head, Truth(1, router, chosen.indices, chosen.values.softmax(-1)))
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_it_learns_what_the_experts_chosen_here_do_to_the_next_router(run: Run) -> None:
    """The target's logits are a fixed map of this layer's gate weights: untrained it is at chance, and so it is on another's routing."""
    effects = torch.randn(N_EXPERTS, N_EXPERTS, generator=torch.Generator().manual_seed(5))
    views = views_per_layer(make_run(n_sequences=60, seed=4))
    seen = [views[0]]
    for layer in range(1, N_LAYERS):
        before = seen[-1]
        used = torch.zeros(len(before.hidden), N_EXPERTS).scatter_(1, before.topk_ids, before.topk_weights)
        logits = used @ effects.T
        hidden = _hidden_for(run, layer, logits)
        seen.append(dataclasses.replace(views[layer], topk_ids=logits.topk(TOP_K).indices, hidden=hidden))
    predictor = MarginGate(width=8)
    report = fit(predictor, run.model, seen, seen, FitOptions(epochs=60, batch_rows=64, learning_rate=2e-2, patience=60))
    shuffled = [
        dataclasses.replace(view, topk_ids=view.topk_ids.roll(1, 0), topk_weights=view.topk_weights.roll(1, 0)) for view in seen
    ]
    with torch.no_grad():
        misled = predictor.logits(shuffled)
    found = [_recall(scores, seen[target].topk_ids) for target, scores in misled.items()]
    assert report.recalls[0] < 0.5
    assert max(report.recalls) > 0.8
    assert sum(found) / len(found) < max(report.recalls) - 0.2


def _recall(scores: torch.Tensor, true: torch.Tensor) -> float:
    best = scores.topk(TOP_K).indices
    return float((true[:, :, None] == best[:, None, :]).any(-1).float().mean())


def _hidden_for(run: Run, layer: int, logits: torch.Tensor) -> torch.Tensor:
    """[T, H]: router inputs that layer `layer`'s router turns into `logits` (H > E, so there are some)."""
    router = run.model.router_logits[layer](torch.eye(HIDDEN)).T  # [E, H]
    return logits @ torch.linalg.pinv(router).T


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_softens_nothing_is_refused(temperature: float, run: Run) -> None:
    with pytest.raises(ConfigError, match=r"predictor.temperature=.*: it must be above 0"):
        MarginGate(temperature=temperature).use(run.model)


def test_a_network_without_width_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"predictor.width=0: it must be at least 1"):
        MarginGate(width=0).use(run.model)
