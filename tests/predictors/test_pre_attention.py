"""Pre-attention prediction: the loss is the paper's, live it speaks before its own layer routes, and says what it says of a recording."""

from __future__ import annotations

from itertools import product
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch

from predictors.base import AttentionView, Prediction
from predictors.evaluation import count_guesses, quality
from predictors.fitting import FitOptions, fit
from predictors.learned import Truth
from predictors.pre_attention import PreAttention, class_weights, pairwise_hinge
from prefetch.accounting import intended_step, violations
from prefetch.errors import ConfigError
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, TOP_K, make_run, show, views_per_layer
from tests.prefetch.offloaded import Setting, decode, offloaded


def test_the_loss_is_weighted_cross_entropy_and_a_hinge_over_pairs() -> None:
    random = torch.Generator().manual_seed(2)
    router, head = torch.randn(9, N_EXPERTS, generator=random), 0.3 * torch.randn(9, N_EXPERTS, generator=random)
    predictor, ids = PreAttention(), router.topk(TOP_K).indices
    predictor.use(make_run().model)
    entropy, hinge = [], []
    for logits, scores, chosen in zip(router.tolist(), head.double().tolist(), ids.tolist(), strict=True):
        ranks = {expert: rank for rank, expert in enumerate(sorted(range(N_EXPERTS), key=lambda e: -logits[e]))}
        for expert, score in enumerate(scores):
            weight = 3.0 if ranks[expert] < 3 else 0.5 if ranks[expert] >= 10 else 1.5  # k = 2: ranks 10/6 * 2 and 30/6 * 2
            p = 1 / (1 + exp(-score))
            entropy.append(-weight * log(p if expert in chosen else 1 - p))
        others = [expert for expert in range(N_EXPERTS) if expert not in chosen]
        hinge += [max(0.0, 0.1 - (scores[i] - scores[j])) for i, j in product(chosen, others)]
    expected = sum(entropy) / len(entropy) + 0.3 * sum(hinge) / len(hinge)
    found = predictor.loss(head, Truth(1, router, ids, router.topk(TOP_K).values.softmax(-1)))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_class_weights_of_the_papers_own_size() -> None:
    logits = torch.arange(64.0).flip(0)[None]
    weights = class_weights(logits, 6)[0].tolist()
    assert weights == [3.0] * 10 + [1.5] * 20 + [0.5] * 34


def test_a_right_order_with_room_costs_no_hinge() -> None:
    logits, ids = torch.tensor([[0.5, 0.3, 0.19, -1.0]]), torch.tensor([[0, 1]])
    assert float(pairwise_hinge(logits, ids)) == 0
    assert float(pairwise_hinge(logits - torch.tensor([0.0, 0.2, 0.0, 0.0]), ids)) == pytest.approx(0.19 / 4)


def test_it_names_each_layers_own_experts_the_first_included() -> None:
    run = make_run(n_sequences=40)
    predictor, views = PreAttention(width=32), views_per_layer(run)
    options = FitOptions(epochs=30, batch_rows=64, learning_rate=1e-2, patience=30)
    report = fit(predictor, run.model, views, views, options)
    assert set(report.recall_per_target) == set(range(N_LAYERS))
    assert report.recall_per_target[0] > report.recalls[0] + 0.2
    told = [(view.layer, p.layer) for view, given in show(predictor, run) for p in given]
    assert told == [(view.layer, view.layer) for view in run.views]


class Trained(PreAttention):
    """With a network of random weights, and a record of what it was shown before which routings."""

    def bind(self, model) -> None:  # type: ignore[no-untyped-def]
        self.use(model)
        torch.manual_seed(0)
        self.network = self.build().eval().requires_grad_(False)
        self.shown: list[tuple[AttentionView, Prediction]] = []

    def predict_before_attention(self, seen: AttentionView) -> list[Prediction]:
        found = super().predict_before_attention(seen)
        self.shown.append((seen, found[0]))
        return found


def test_live_it_speaks_before_its_layer_routes_and_the_books_balance(tiny_qwen3: Path, tmp_path: Path) -> None:
    predictor = Trained(width=16)
    normed: list[torch.Tensor] = []
    with offloaded(tiny_qwen3, tmp_path, Setting(predictor=predictor)) as (model, runtime):
        hooks = [
            layer.input_layernorm.register_forward_hook(lambda _, __, out: normed.append(out.flatten(0, 1)))
            for layer in model.model.layers
        ]
        decode(model)
        for hook in hooks:
            hook.remove()
        runtime.finish()
        trace, record = runtime.recorder.trace({}), runtime.record()
    n_layers = trace.n_layers
    assert [seen.layer for seen, _ in predictor.shown] == list(range(n_layers)) * (len(predictor.shown) // n_layers)
    assert all(torch.equal(seen.pre_attention, state) for (seen, _), state in zip(predictor.shown, normed, strict=True))
    for layer in range(n_layers):
        said = torch.cat([p.scores for seen, p in predictor.shown if seen.layer == layer])
        width = trace.guesses[0].shape[2]
        expected = said.sort(dim=1, descending=True, stable=True).indices[:, :width].numpy()
        assert (trace.guesses[0][:, layer] == expected).all()
    assert set(trace.guesses) == {0}
    assert quality(count_guesses(trace))["coverage"].tolist() == [1.0, 1.0]
    assert violations(record) == []
    prefetches = record.transfers[record.transfers["kind"] == "prefetch"]
    assert len(prefetches) and (prefetches["lookahead"] == 0).all()
    assert (intended_step(prefetches) == prefetches["step"]).all()
    assert set(prefetches["layer"]) >= {0}, "the first layer is prefetched too"
    assert (record.calls["predictor_s"] > 0).mean() > 0.9
    assert (record.calls["overhead_s"] >= 0).all()
    later = record.calls["start_s"].to_numpy()
    ends = later + record.calls["total_s"].to_numpy()
    assert np.all(later[1:] >= ends[:-1] - 1e-9), "calls do not overlap, though each begins with what was predicted before it"


def test_without_width_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="predictor.width=0: it must be at least 1"):
        PreAttention(width=0).use(make_run().model)
