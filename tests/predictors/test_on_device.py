"""Families that compute where the model does keep no tensor elsewhere and wait for nothing: shown on the meta device, which
refuses to mix with another and has no values to look at."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from predictors.base import LayerView
from tests.predictors.synthetic_run import CONF, HIDDEN, N_EXPERTS, N_LAYERS, STATES, configured, make_run, show

META = torch.device("meta")
NAMES = sorted(path.stem for path in (CONF / "predictor").glob("*.yaml"))
ON_DEVICE = [name for name in NAMES if configured("predictor", name).on_device]


def on_meta(seen: LayerView) -> LayerView:
    return dataclasses.replace(seen, **{name: getattr(seen, name).to(META) for name in STATES})


@pytest.mark.parametrize("name", ON_DEVICE)
def test_scores_stay_on_the_models_device(name: str) -> None:
    run = make_run()
    predictor = configured("predictor", name)
    assert list(show(predictor, run))
    linear = partial(torch.nn.functional.linear, weight=torch.empty(N_EXPERTS, HIDDEN, device=META))
    predictor.bind(dataclasses.replace(run.model, router_logits=[linear] * N_LAYERS, device=META))
    predictor.start_sequence()
    n_scores = 0
    for view in run.views[: 3 * N_LAYERS]:
        seen = on_meta(view)
        early = predictor.predict_before_attention(seen.before_attention) if predictor.before_attention else []
        for prediction in early + predictor.predict(seen):
            assert prediction.scores.device == META
            n_scores += 1
    assert n_scores > 0


def test_what_trained_and_gate_reusing_families_need_no_copy_for() -> None:
    assert {"gate_reuse", "margin_gate", "prescope", "pre_gate"} <= set(ON_DEVICE)
    assert {"popularity", "token_id", "oracle"} & set(ON_DEVICE) == set()
