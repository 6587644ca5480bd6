"""The pre-gate head: it starts as gate reuse, reads the router's input alone, and training towards the router improves it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from predictors.base import ModelView
from predictors.fitting import FitOptions, fit
from predictors.gate_reuse import GateReuse
from predictors.learned import Truth
from predictors.pre_gate import PreGate, reused_gate
from tests.predictors.synthetic_run import HIDDEN, N_EXPERTS, N_LAYERS, Run, make_run, show, views_per_layer


@pytest.fixture(scope="module")
def run() -> Run:
    """As `make_run`, but every norm has gains of its own."""
    random = torch.Generator().manual_seed(7)
    gains = [torch.rand(HIDDEN, generator=random) + 0.5 for _ in range(N_LAYERS)]
    norms = [lambda x, gain=gain: torch.nn.functional.rms_norm(x, (HIDDEN,), gain) for gain in gains]
    made = make_run(n_sequences=24)
    model = dataclasses.replace(made.model, pre_moe_norm=norms)
    views = [dataclasses.replace(view, hidden=norms[view.layer](view.residual)) for view in made.views]
    return Run(model, views, made.trace)


@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_untrained_it_is_gate_reuse(lookahead: int, run: Run) -> None:
    untrained = PreGate(lookahead)
    views = views_per_layer(run)
    fit(untrained, run.model, views, views, FitOptions(epochs=1, batch_rows=32, learning_rate=1e-12, weight_decay=0.0))
    for (_, ours), (_, theirs) in zip(show(untrained, run), show(GateReuse(lookahead), run), strict=True):
        assert [p.layer for p in ours] == [p.layer for p in theirs]
        for mine, reused in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.scores, reused.scores, rtol=1e-3, atol=1e-4)


def test_a_routers_bias_and_a_blanked_channel_leave_the_head_finite(run: Run) -> None:
    random = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(N_EXPERTS, HIDDEN, generator=random), torch.randn(N_EXPERTS, generator=random)
    blank = torch.ones(HIDDEN).index_fill_(0, torch.tensor([3]), 0.0)
    model = ModelView(
        2, N_EXPERTS, 2, HIDDEN,
        [lambda x: torch.nn.functional.linear(x, weight, bias)] * 2,
        [lambda x: torch.nn.functional.rms_norm(x, (HIDDEN,), blank), lambda x: torch.nn.functional.rms_norm(x, (HIDDEN,))],
    )  # fmt: skip
    head = reused_gate(model, 0, 1, torch.float32)
    assert torch.equal(head[:, 3], torch.zeros(N_EXPERTS))
    kept = [i for i in range(HIDDEN) if i != 3]
    torch.testing.assert_close(head[:, kept], weight[:, kept], rtol=1e-5, atol=1e-5)


def test_the_loss_asks_of_every_expert_whether_it_was_chosen() -> None:
    random = torch.Generator().manual_seed(2)
    router, head = torch.randn(9, N_EXPERTS, generator=random), torch.randn(9, N_EXPERTS, generator=random)
    chosen = router.topk(2)
    truth = Truth(1, router, chosen.indices, chosen.values.softmax(-1))
    terms = [
        -math.log(p if expert in ids else 1 - p)
        for row, ids in zip(head.double().sigmoid().tolist(), chosen.indices.tolist(), strict=True)
        for expert, p in enumerate(row)
    ]
    assert float(PreGate().loss(head, truth)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_training_finds_a_drift_that_gate_reuse_cannot_see(run: Run) -> None:
    """The target layer's state is a fixed rotation of this layer's: a linear head can learn it, gate reuse stays at chance."""
    rotation = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(3)))[0]
    views = views_per_layer(make_run(n_sequences=60, seed=4))
    seen = [views[0]]
    for layer in range(1, N_LAYERS):
        hidden = seen[-1].hidden @ rotation.T
        ids = run.model.router_logits[layer](hidden).topk(2).indices
        seen.append(dataclasses.replace(views[layer], hidden=hidden, topk_ids=ids))
    predictor = PreGate()
    report = fit(predictor, run.model, seen, seen, FitOptions(epochs=80, batch_rows=64, learning_rate=4e-2, patience=80))
    assert report.recalls[0] < 0.5 < 0.9 < max(report.recalls)
    assert predictor.n_parameters() == (N_LAYERS - 1) * N_EXPERTS * HIDDEN
