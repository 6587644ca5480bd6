"""Every predictor in conf/predictor, found by itself, keeps the promises of `predictors/base.py`."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from predictors.base import Predictor
from predictors.lookahead import layers_ahead
from prefetch.errors import ConfigError
from tests.predictors.synthetic_run import CONF, N_LAYERS, check_contract, configured, make_run, show

NAMES = sorted(path.stem for path in (CONF / "predictor").glob("*.yaml"))
TRAINED = [path.stem for path in (CONF / "predictor").glob("*.yaml") if "weights" in OmegaConf.load(path)]
INTO_NEXT_PASS = {"sequence"}  # trained, and yet they look into the next forward pass, as those that count do
GATES = {"fate", "gate_reuse", "own_gate", "shared_expert_gate", "shuffled_gate"}
WITHIN_PASS = {"co_occurrence", "token_id", *GATES}  # not trained, and they see no further than the last layer
FARTHEST = dict.fromkeys(WITHIN_PASS.union(TRAINED) - INTO_NEXT_PASS, N_LAYERS - 1)
WITH_LOOKAHEAD = [name for name in NAMES if "lookahead" in OmegaConf.load(CONF / "predictor" / f"{name}.yaml")]


@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_contract(name: str) -> None:
    predictor = configured("predictor", name)
    assert isinstance(predictor, Predictor)
    assert predictor.name == name
    check_contract(predictor, make_run())


@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_contract_for_a_batch(name: str) -> None:
    check_contract(configured("predictor", name), make_run(batch=3))


@pytest.mark.parametrize("name", NAMES)
def test_may_be_called_in_inference_mode_and_outside_it(name: str) -> None:
    calls = show(configured("predictor", name), make_run())
    next(calls)  # binds, and trains where that is needed
    for n in range(len(make_run().views) - 1):
        with torch.inference_mode(n % 3 < 2):
            next(calls)


@pytest.mark.parametrize("name", NAMES)
def test_yaml_and_dataclass_agree_on_the_knobs_and_their_defaults(name: str) -> None:
    predictor = configured("predictor", name)
    knobs = dict(OmegaConf.load(CONF / "predictor" / f"{name}.yaml"))
    del knobs["_target_"]
    knobs |= {"weights": None} if "weights" in knobs else {}  # a class has none of its own, its YAML names the bundled model's
    assert knobs == {f.name: f.default for f in dataclasses.fields(predictor) if f.init}


@pytest.mark.parametrize("name", WITH_LOOKAHEAD)
def test_predicts_at_the_largest_lookahead(name: str) -> None:
    farthest = FARTHEST.get(name, N_LAYERS)
    predictor = configured("predictor", name, f"predictor.lookahead={farthest}")
    check_contract(predictor, make_run())
    ahead = partial(layers_ahead, n_layers=N_LAYERS, before_attention=predictor.before_attention)
    distances = [ahead(view.layer, p.layer) for view, predictions in show(predictor, make_run()) for p in predictions]
    assert max(distances) == farthest


@pytest.mark.parametrize("name", WITH_LOOKAHEAD)
def test_refuses_an_impossible_lookahead(name: str) -> None:
    run, farthest = make_run(), FARTHEST.get(name, N_LAYERS)
    for lookahead in (0, farthest + 1):
        predictor = configured("predictor", name, f"predictor.lookahead={lookahead}")
        with pytest.raises(ConfigError, match=f"predictor.lookahead={lookahead}: it must be from 1 to {farthest}"):
            next(show(predictor, run))


def test_none_predicts_nothing() -> None:
    assert not any(predictions for _, predictions in show(configured("predictor", "none"), make_run()))
