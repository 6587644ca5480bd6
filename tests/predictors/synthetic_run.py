"""A small run that every predictor can be shown: two sequences through routers with weights, recorded as a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from predictors.base import LayerView, ModelView, Prediction, Predictor, PreGateView
from predictors.fitting import FitOptions, fit
from predictors.learned import LearnedPredictor
from predictors.lookahead import layers_ahead
from predictors.quasi_hidden import QuasiHidden
from prefetch.trace import RoutingTrace

STATES = ("hidden", "residual", "topk_ids", "topk_weights", "token_ids", "pre_attention", "previous_final")
CONF = Path(__file__).resolve().parents[2] / "conf"
N_LAYERS, N_EXPERTS, TOP_K, HIDDEN, PROMPT, DECODED = 4, 8, 2, 16, 5, 6


@dataclass(frozen=True)
class Run:
    """What a runtime would have shown to a predictor, in order, and the recording of it."""

    model: ModelView
    views: list[LayerView]
    trace: RoutingTrace


def make_run(n_sequences: int = 2, batch: int = 1, seed: int = 0) -> Run:
    """Random tokens through random routers; the residual drifts a little from layer to layer, as in a real model."""
    random = torch.Generator().manual_seed(seed)
    routers = [torch.randn(N_EXPERTS, HIDDEN, generator=random) for _ in range(N_LAYERS)]
    model = ModelView(
        N_LAYERS,
        N_EXPERTS,
        TOP_K,
        HIDDEN,
        [partial(torch.nn.functional.linear, weight=router) for router in routers],
        [lambda residual: torch.nn.functional.rms_norm(residual, (HIDDEN,))] * N_LAYERS,
        pre_gates=PreGateView(
            1, False, {n: partial(torch.nn.functional.linear, weight=routers[n]) for n in range(1, N_LAYERS)}
        ),
        shared_experts=[lambda hidden, layer=layer: 0.1 * (layer + 1) * hidden.flip(1) for layer in range(N_LAYERS)],
    )
    views = []
    for sequence in range(n_sequences):
        for step in range(1 + DECODED):
            n_tokens = batch * (1 if step else PROMPT)
            token_ids = torch.randint(50, (n_tokens,), generator=random)
            residual = before = torch.randn(n_tokens, HIDDEN, generator=random)
            final = residual.roll(1, 1)  # of the token before, were this a model; one that says something of this token
            for layer in range(N_LAYERS):
                hidden = model.pre_moe_norm[layer](residual)
                weights, ids = model.router_logits[layer](hidden).softmax(-1).topk(TOP_K)
                views.append(LayerView(layer, step, sequence, hidden, residual, ids, weights, token_ids, before, final))
                before = torch.nn.functional.rms_norm(residual, (HIDDEN,))
                residual = residual + 0.2 * torch.randn(n_tokens, HIDDEN, generator=random)
    return Run(model, views, record(views))


def record(views: list[LayerView]) -> RoutingTrace:
    """The routing trace of `views`, with guesses for every lookahead: the truth, and nothing more."""
    forwards = [views[i : i + N_LAYERS] for i in range(0, len(views), N_LAYERS)]
    per_token = [(f[0].sequence, f[0].step, f[0].step > 0) for f in forwards for _ in f[0].token_ids]
    sequence, step, phase = (np.array(column) for column in zip(*per_token, strict=True))
    topk_ids = torch.cat([torch.stack([v.topk_ids for v in f], 1) for f in forwards]).numpy()
    nothing_resident = np.zeros((*topk_ids.shape[:2], N_EXPERTS), bool)
    return RoutingTrace(
        sequence.astype(np.int32),
        step.astype(np.int32),
        phase.astype(np.uint8),
        torch.cat([f[0].token_ids for f in forwards]).numpy().astype(np.int32),
        topk_ids.astype(np.uint16),
        torch.cat([torch.stack([v.topk_weights for v in f], 1) for f in forwards]).numpy().astype(np.float32),
        N_EXPERTS,
        guesses={lookahead: topk_ids.astype(np.int16) for lookahead in range(1, N_LAYERS + 1)},
        resident=dict.fromkeys(range(1, N_LAYERS + 1), nothing_resident),
    )


def views_per_layer(run: Run) -> list[LayerView]:
    """What each layer saw over the whole run, as one view: the form in which predictors are trained."""
    stacked = []
    for layer in range(N_LAYERS):
        views = [view for view in run.views if view.layer == layer]
        states = {name: torch.cat([getattr(view, name) for view in views]) for name in STATES}
        stacked.append(LayerView(layer, 0, 0, **states))
    return stacked


def show(predictor: Predictor, run: Run) -> Iterator[tuple[LayerView, list[Prediction]]]:
    """Bind `predictor` and show it the run as the runtime would; yields its answer to each layer call.

    One that is trained, and has not been, is trained on the run first: its YAML's weights are another model's.
    """
    if isinstance(predictor, LearnedPredictor) and predictor.network is None:
        views = views_per_layer(run)
        fit(predictor, run.model, views, views, FitOptions(epochs=2, batch_rows=8))
    if isinstance(predictor, QuasiHidden):
        predictor.vectors = torch.randn(N_LAYERS, N_EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    if hasattr(predictor, "use_trace"):
        predictor.use_trace(run.trace)
    if hasattr(predictor, "use_states"):
        predictor.use_states(lambda sequence: (view for view in run.views if view.sequence == sequence))
    predictor.bind(run.model)
    sequence = None
    for view in run.views:
        if view.sequence != sequence:
            predictor.start_sequence()
            sequence = view.sequence
        early = predictor.predict_before_attention(view.before_attention) if predictor.before_attention else []
        yield view, early + predictor.predict(view)


def check_contract(predictor: Predictor, run: Run) -> None:
    """What every predictor owes the runtime, whatever its idea."""
    given: list[Tensor] = []
    copies: list[Tensor] = []
    for view, predictions in show(predictor, run):
        ahead = partial(layers_ahead, view.layer, n_layers=N_LAYERS, before_attention=predictor.before_attention)
        distances = [ahead(p.layer) for p in predictions]
        assert distances == sorted(set(distances)), f"layer {view.layer}: not nearest first, or one twice: {distances}"
        farthest = getattr(predictor, "lookahead", None) or N_LAYERS
        assert all(d <= farthest for d in distances), f"predicts {distances} layers ahead, its lookahead is {farthest}"
        for p in predictions:
            assert 0 <= p.layer < N_LAYERS
            assert p.scores.shape in ((len(view.token_ids), N_EXPERTS), (1, N_EXPERTS))
            assert p.scores.dtype.is_floating_point
            assert not p.scores.isnan().any()
            assert not (p.scores == torch.inf).any()
            given.append(p.scores)
            copies.append(p.scores.clone())
    assert all(map(torch.equal, given, copies)), "scores changed after they were handed out: records keep references"
    again = [p.scores for _, predictions in show(predictor, run) for p in predictions]
    assert len(again) == len(copies)
    assert all(map(torch.equal, again, copies)), "the same run after a fresh bind gave other scores"


def configured(group: str, name: str, *overrides: str) -> Any:
    """The object that `conf/<group>/<name>.yaml` describes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return instantiate(compose(overrides=[f"+{group}={name}", *overrides])[group])
