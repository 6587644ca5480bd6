"""A predictor that lives outside the repository is named by `_target_` and needs nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from tests.predictors.synthetic_run import CONF, N_EXPERTS, check_contract, make_run, show

ELSEWHERE = """
from dataclasses import dataclass

import torch

from predictors.base import LayerView, Prediction, Predictor


@dataclass
class AlwaysTheSame(Predictor):
    expert: int

    def predict(self, seen: LayerView) -> list[Prediction]:
        scores = torch.full((1, self.model.n_experts), -torch.inf)
        scores[0, self.expert] = 0.0
        return [Prediction((seen.layer + 1) % self.model.n_layers, scores)]
"""


def test_a_predictor_of_another_project_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "someones_project"
    package.mkdir()
    (package / "their_predictor.py").write_text(ELSEWHERE)
    monkeypatch.syspath_prepend(tmp_path)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            overrides=[
                "+predictor=none",
                "predictor._target_=someones_project.their_predictor.AlwaysTheSame",
                "+predictor.expert=3",
            ]
        )
    predictor, run = instantiate(config.predictor), make_run()
    check_contract(predictor, run)
    guesses = [p.scores.argmax(-1).tolist() for _, predictions in show(predictor, run) for p in predictions]
    assert guesses == [[3]] * len(run.views)
    assert N_EXPERTS > 3
