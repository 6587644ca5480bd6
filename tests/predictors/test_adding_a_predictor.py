"""The example of docs/adding_a_predictor.md is complete: copied out, it keeps the contract and does what it says."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import predictors
from predictors.base import Predictor
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, check_contract, make_run, show

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding_a_predictor.md"
HEADING_AND_BLOCK = re.compile(r"^## \d\. Write `(?P<path>.+?)`\n\n```(?:python|yaml)\n(?P<text>.+?)^```", re.M | re.S)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Predictor]:
    """The page's files, written where it says (beside the repository's own), composed from its YAML."""
    files = {match["path"]: match["text"] for match in HEADING_AND_BLOCK.finditer(PAGE.read_text())}
    assert sorted(files) == ["conf/predictor/transition.yaml", "predictors/transition.py"]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr("predictors.__path__", [str(tmp_path / "predictors"), *predictors.__path__])
    yield instantiate(OmegaConf.load(tmp_path / "conf/predictor/transition.yaml"))
    del sys.modules["predictors.transition"]
    delattr(predictors, "transition")


@pytest.mark.parametrize("batch", [1, 3])
def test_the_example_keeps_the_contract(example: Predictor, batch: int) -> None:
    assert isinstance(example, Predictor)
    assert example.name == "transition"
    check_contract(example, make_run(batch=batch))


def test_the_example_counts_transitions(example: Predictor) -> None:
    run = make_run(n_sequences=1)
    routed = {(v.step, v.layer): v.topk_ids.tolist() for v in run.views}
    followed: Counter[tuple[int, int, int]] = Counter()
    n_checked = 0
    for view, predictions in show(example, run):
        now = routed[view.step, view.layer]
        if view.layer:
            for before, after in zip(routed[view.step, view.layer - 1], now, strict=True):
                followed.update((view.layer, b, a) for b in before for a in after)
        for p in predictions:
            expected = [[sum(followed[p.layer, b, e] + 0.01 for b in token) for e in range(N_EXPERTS)] for token in now]
            torch.testing.assert_close(p.scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)
            n_checked += 1
    assert n_checked == len(run.views) * (N_LAYERS - 1) // N_LAYERS
