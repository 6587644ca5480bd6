"""Judged on a recording, predictors say what they say in a run: guess for guess, on the same tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from experiments.accuracy import compose_predictor
from experiments.config import register
from experiments.judging import judge, samples
from experiments.model_view import load_model_view
from predictors.base import LayerView, Prediction, Predictor
from predictors.draft import Draft
from predictors.pre_attention import PreAttention
from predictors.recording import Recording
from prefetch.errors import PredictorError
from prefetch.trace import RoutingTrace

REPOSITORY = Path(__file__).parents[2]
WORKLOAD = ["workload.n_prompts=2", "workload.warmup_batches=0", "workload.new_tokens=8", "workload.max_prompt_tokens=48"]
ONE_ARM = [*(f"arms.{name}=null" for name in ("on_demand", "oracle", "resident")), "repeats=1", "check_tokens=false"]
HISTORIES = ["popularity", "previous_token", "co_occurrence", "token_id", "activation_matrices", "random_guess"]
LIVE = [*HISTORIES, "gate_reuse", "fate", "quasi_hidden", "shuffled_gate", "corrected_gate", "margin_gate", "draft"]


def run(module: str, *overrides: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *overrides, *WORKLOAD, "tracking=disabled"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = tmp_path_factory.mktemp("recording")
    run("experiments.collect", "collect.hidden_states=true", f"hydra.run.dir={folder}")
    return Recording(folder)


@pytest.fixture(scope="module")
def knobs(tmp_path_factory: pytest.TempPathFactory, model: tuple) -> dict[str, str]:
    """What a family needs besides its name: weights, where none are shipped; any will do."""
    draft, path = Draft(), tmp_path_factory.mktemp("weights") / "draft.safetensors"
    draft.use(model[0])
    torch.manual_seed(0)
    draft.network = draft.build()
    draft.save(path, {})
    return {"draft": f"weights={path}"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, knobs: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("live")
    also = {name: f",'predictor.{knob}'" for name, knob in knobs.items()}
    arms = [f"+arms.{name}=['predictor={name}'{also.get(name, '')}]" for name in LIVE if name != "gate_reuse"]
    run("experiments.decode", "predictor=gate_reuse", *ONE_ARM, *arms, f"hydra.run.dir={folder}")
    return folder


@pytest.fixture(scope="module")
def model() -> tuple:
    return load_model_view(OmegaConf.create({"model": {"path": "models/bytes-moe", "dtype": "float32"}}))


def composed(name: str) -> Predictor:
    from hydra import initialize_config_dir

    register()
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return compose_predictor(name, "models/bytes-moe")


@pytest.mark.parametrize("name", LIVE)
def test_live_and_judged_guesses_are_the_same(
    name: str, recording: Recording, live: Path, model: tuple, knobs: dict[str, str]
) -> None:
    view, geometry = model
    predictor = composed(f"{name} {knobs.get(name, '')}")
    predictor.bind(view)
    traces = [judged.trace for judged in judge(predictor, recording, recording.split("workload"), geometry)]
    arm = "predicted" if name == "gate_reuse" else name
    seen_live = RoutingTrace.load(live / f"trace_{arm}.safetensors")
    assert seen_live.n_tokens == sum(trace.n_tokens for trace in traces)
    assert (seen_live.topk_ids == np.concatenate([trace.topk_ids for trace in traces])).all()
    for lookahead, guesses in seen_live.guesses.items():
        none = np.full_like(guesses, -1)  # of a document for which nothing was guessed
        judged_guesses = [trace.guesses.get(lookahead, none[: trace.n_tokens]) for trace in traces]
        assert (guesses == np.concatenate(judged_guesses)).all()
        assert (guesses >= 0).any()


def test_samples_are_the_scores_of_each_token_and_what_its_router_chose(recording: Recording, model: tuple) -> None:
    view, geometry = model
    predictor = composed("gate_reuse")
    predictor.bind(view)
    documents = recording.split("workload")
    found = samples(judge(predictor, recording, documents, geometry))
    rows = recording.rows(documents)
    assert set(found) == set(range(1, 8))
    for target, (scores, chosen) in found.items():
        residual = rows[target - 1].residual
        assert residual is not None
        expected = view.router_logits[target](view.pre_moe_norm[target](residual))
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(chosen.nonzero()[:, 1].view(-1, 4), rows[target].topk_ids.sort(1).values)


def test_what_is_said_before_attention_is_judged_at_the_layer_itself(recording: Recording, model: tuple) -> None:
    view, geometry = model
    predictor = PreAttention(width=16)
    predictor.use(view)
    predictor.network = predictor.build().requires_grad_(False)
    documents = recording.split("workload")
    judged = list(judge(predictor, recording, documents, geometry))
    found = samples(judged)
    for layer, expected in predictor.logits(recording.rows(documents)).items():
        torch.testing.assert_close(found[layer][0], expected)
        ranked = np.concatenate([one.trace.guesses[0][:, layer] for one in judged])
        scores = np.take_along_axis(found[layer][0].numpy(), ranked.astype(np.int64), axis=1)
        assert (np.diff(scores, axis=1) <= 0).all()
    assert set(found) == set(range(8)) and all(set(one.trace.guesses) == {0} for one in judged)


class Failing(Predictor):
    name = "failing"

    def predict(self, seen: LayerView) -> list[Prediction]:
        raise ValueError("no idea")


class Narrow(Predictor):
    name = "narrow"

    def predict(self, seen: LayerView) -> list[Prediction]:
        return [Prediction(seen.layer, torch.zeros(1, 3))]


@pytest.mark.parametrize(
    ("predictor", "message"), [(Failing(), "failed at MoE layer 0.*no idea"), (Narrow(), r"shape \(1, 3\)")]
)
def test_a_predictor_that_fails_is_not_judged(predictor: Predictor, message: str, recording: Recording, model: tuple) -> None:
    view, geometry = model
    predictor.bind(view)
    with pytest.raises(PredictorError, match=message):
        list(judge(predictor, recording, recording.documents, geometry))
