"""What no family may swallow: weights of something else or damaged, data that lack something, too little of them, NaN.

Every family of conf/predictor is found by itself. Its file is made by training it, or measuring its vectors, on the synthetic run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from experiments.judging import judge
from predictors import weights as weights_file
from predictors.base import LayerView, ModelView, Predictor
from predictors.fitting import FitOptions, fit
from predictors.learned import LearnedPredictor
from predictors.quasi_hidden import QuasiHidden
from predictors.quasi_hidden import save as save_vectors
from predictors.recording import RecordedDocument, Recording
from prefetch.errors import ConfigError, PredictorError
from prefetch.geometry import ExpertGeometry, MoEGeometry
from tests.predictors.synthetic_run import (
    CONF,
    HIDDEN,
    N_EXPERTS,
    N_LAYERS,
    TOP_K,
    configured,
    make_run,
    views_per_layer,
)

RUN = make_run()
NAMES = sorted(path.stem for path in (CONF / "predictor").glob("*.yaml"))
WITH_FILE = [name for name in NAMES if "weights" in OmegaConf.load(CONF / "predictor" / f"{name}.yaml")]
FITTED = [name for name in WITH_FILE if isinstance(configured("predictor", name), LearnedPredictor)]
OPTIONS = FitOptions(epochs=1, batch_rows=8)


@cache
def stored(name: str) -> bytes:
    """The file of family `name`, for the model of the run."""
    predictor = configured("predictor", name)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        if isinstance(predictor, LearnedPredictor):
            predictor.weights = None
            fit(predictor, RUN.model, views_per_layer(RUN), views_per_layer(RUN), OPTIONS)
            predictor.save(path, {})
        else:
            assert isinstance(predictor, QuasiHidden)
            save_vectors(path, torch.ones(N_LAYERS, N_EXPERTS, HIDDEN), RUN.model, {})
        return path.read_bytes()


def bind(name: str, file: bytes, model: ModelView, folder: Path) -> Predictor:
    """Family `name` with the weights in `file`, bound to `model`."""
    path = folder / "weights.safetensors"
    path.write_bytes(file)
    predictor: Predictor = configured("predictor", name, f"predictor.weights={path}")
    predictor.bind(model)
    return predictor


@pytest.mark.parametrize("name", WITH_FILE)
def test_the_right_model_is_accepted(name: str, tmp_path: Path) -> None:
    assert bind(name, stored(name), RUN.model, tmp_path).model is RUN.model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": "another"}, "trained for another model"),
        ({"n_layers": N_LAYERS + 1}, f"trained for MoE layers={N_LAYERS}, here it is {N_LAYERS + 1}"),
        ({"n_experts": 2 * N_EXPERTS}, f"trained for experts={N_EXPERTS}, here it is {2 * N_EXPERTS}"),
        ({"top_k": TOP_K + 1}, f"trained for top_k={TOP_K}, here it is {TOP_K + 1}"),
        ({"hidden_size": 2 * HIDDEN}, f"trained for hidden_size={HIDDEN}, here it is {2 * HIDDEN}"),
    ],
    ids=["another model", "layers", "experts", "k", "hidden size"],
)
@pytest.mark.parametrize("name", WITH_FILE)
def test_weights_for_something_else_are_refused(name: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match=said):
        bind(name, stored(name), dataclasses.replace(RUN.model, **change), tmp_path)


@pytest.mark.parametrize("name", WITH_FILE)
def test_weights_of_another_family_are_refused(name: str, tmp_path: Path) -> None:
    other = next(family for family in WITH_FILE if family != name)
    with pytest.raises(PredictorError, match=f"trained for family='{other}', here it is '{name}'"):
        bind(name, stored(other), RUN.model, tmp_path)


def _flip_a_bit(file: bytes) -> bytes:
    return file[:-1] + bytes([file[-1] ^ 1])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: b"", "truncated or damaged"),
        (lambda file: file[: len(file) // 2], "truncated or damaged"),
        (lambda file: file[:-1], "truncated or damaged"),
        (_flip_a_bit, "checksum differs"),
        (lambda file: b"<html>not found</html>", "truncated or damaged"),
    ],
    ids=["empty", "half", "a byte short", "a bit flipped", "something else"],
)
@pytest.mark.parametrize("name", WITH_FILE)
def test_damaged_weights_are_refused(name: str, damage: Callable[[bytes], bytes], said: str, tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match=said):
        bind(name, damage(stored(name)), RUN.model, tmp_path)


@pytest.mark.parametrize("name", WITH_FILE)
def test_weights_that_are_not_finite_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(stored(name))
    with safe_open(path, framework="pt") as file:
        identity = json.loads(file.metadata()["identity"])
    tensors = load_file(path)
    key = next(key for key, tensor in tensors.items() if tensor.is_floating_point())
    tensors[key].view(-1)[0] = torch.nan
    weights_file.write(path, tensors, identity, {})
    with pytest.raises(PredictorError, match="numbers that are not finite"):
        bind(name, path.read_bytes(), RUN.model, tmp_path)


@pytest.mark.parametrize("name", WITH_FILE)
def test_no_weights_is_an_error_that_names_the_command(name: str) -> None:
    predictor = configured("predictor", name, "predictor.weights=null")
    with pytest.raises(ConfigError, match=r"python -m experiments\.\w+"):
        predictor.bind(RUN.model)


def without(feature: str) -> list[LayerView]:
    return [dataclasses.replace(view, **{feature: None}) for view in views_per_layer(RUN)]


def with_nan(feature: str) -> list[LayerView]:
    views = views_per_layer(RUN)
    getattr(views[2], feature)[3, 1] = torch.nan
    return views


def needed_features(name: str) -> list[str]:
    """The states that training `name` cannot do without: `hidden` always, since all are trained towards the routers' choice."""
    kind = configured("predictor", name)
    return ["hidden"] + ["residual"] * kind.needs_residual + ["pre_attention"] * kind.needs_pre_attention


NEEDED = [(name, feature) for name in FITTED for feature in needed_features(name)]


@pytest.mark.parametrize("held_out", [False, True], ids=["training", "held-out"])
@pytest.mark.parametrize(("name", "feature"), NEEDED)
def test_training_data_must_have_every_feature_finite(name: str, feature: str, held_out: bool) -> None:
    for bad, said in ((without(feature), f"lack '{feature}'"), (with_nan(feature), f"MoE layer 2: {feature} holds NaN")):
        training, judged = (views_per_layer(RUN), bad) if held_out else (bad, views_per_layer(RUN))
        with pytest.raises(PredictorError, match=said):
            fit(configured("predictor", name), RUN.model, training, judged, OPTIONS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda views: views[:-1], f"have {N_LAYERS - 1} MoE layers, the model has {N_LAYERS}"),
        (lambda views: [dataclasses.replace(v, topk_ids=v.topk_ids[:, :1]) for v in views], "route to 1 experts a token"),
        (lambda views: [dataclasses.replace(v, hidden=v.hidden[:, 1:]) for v in views], "hidden has 15 numbers a token"),
    ],
    ids=["layers", "k", "hidden size"],
)
@pytest.mark.parametrize("name", FITTED)
def test_data_of_another_model_are_refused(name: str, change: Callable[[list[LayerView]], list[LayerView]], said: str) -> None:
    with pytest.raises(PredictorError, match=said):
        fit(configured("predictor", name), RUN.model, change(views_per_layer(RUN)), views_per_layer(RUN), OPTIONS)


@pytest.mark.parametrize("name", FITTED)
def test_too_little_data_is_an_error(name: str) -> None:
    with pytest.raises(PredictorError, match="too little training data: 22 tokens, one batch needs 64"):
        fit(configured("predictor", name), RUN.model, views_per_layer(RUN), views_per_layer(RUN), FitOptions(batch_rows=64))


class _Views(Recording):
    """A recording in memory."""

    def __init__(self, shown: list[LayerView]):
        self.shown = shown

    def views(self, document: RecordedDocument, sequence: int) -> Iterator[LayerView]:
        return iter(self.shown)


GATES = {"fate", "gate_reuse", "shared_expert_gate", "shipped_pre_gate"}  # not trained, and yet they read states
READS_STATES = sorted(name for name in {*WITH_FILE, *GATES} if name != "sequence")
SHOWN = RUN.views[: 2 * N_LAYERS]  # two forward passes
STATES = ("hidden", "residual", "pre_attention")


def judged(name: str, shown: list[LayerView], folder: Path) -> None:
    """Judge family `name` on `shown`."""
    weights = folder / "weights.safetensors"
    if name in WITH_FILE:
        weights.write_bytes(stored(name))
    predictor = configured("predictor", name, *([f"predictor.weights={weights}"] if name in WITH_FILE else []))
    predictor.bind(RUN.model)
    geometry = MoEGeometry(N_LAYERS, N_EXPERTS, TOP_K, ExpertGeometry(HIDDEN, 8, torch.float32))
    list(judge(predictor, _Views(shown), [RecordedDocument("text", "held_out", "text", 0)], geometry))


@pytest.mark.parametrize("name", READS_STATES)
def test_nan_states_end_a_judgement(name: str, tmp_path: Path) -> None:
    judged(name, SHOWN, tmp_path)
    nan = [dataclasses.replace(v, **{state: getattr(v, state) + torch.nan for state in STATES}) for v in SHOWN]
    with pytest.raises(PredictorError, match=rf"predictor {name}.* MoE layer \d.*NaN"):
        judged(name, nan, tmp_path)


JUDGED_ON = [
    (name, state)
    for name in READS_STATES
    for state in ("residual", "pre_attention")
    if getattr(configured("predictor", name), f"needs_{state}")
]


@pytest.mark.parametrize(("name", "state"), JUDGED_ON)
def test_a_recording_without_a_needed_state_ends_a_judgement(name: str, state: str, tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match=state):
        judged(name, [dataclasses.replace(v, **{state: None}) for v in SHOWN], tmp_path)
