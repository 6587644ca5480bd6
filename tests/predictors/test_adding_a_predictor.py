"""The examples of docs/adding_a_predictor.md are complete: copied out, they keep the contract and do what they say."""

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
# A line that names a file, a blank one, and the file.
NAME_AND_BLOCK = re.compile(
    r"`(?P<path>(?:predictors|conf)/[^`\n]+)`[^`\n]*\n\n```(?:python|yaml)\n(?P<text>.+?)^```", re.M | re.S
)
EXAMPLES = ("transition", "linear")


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Predictor]]:
    """The page's predictors by name: its files, written where it says (beside the repository's own), composed from their YAML."""
    files = {match["path"]: match["text"] for match in NAME_AND_BLOCK.finditer(PAGE.read_text())}
    assert set(files) == {form.format(name) for name in EXAMPLES for form in ("predictors/{}.py", "conf/predictor/{}.yaml")}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr("predictors.__path__", [str(tmp_path / "predictors"), *predictors.__path__])
    yield {name: instantiate(OmegaConf.load(tmp_path / f"conf/predictor/{name}.yaml")) for name in EXAMPLES}
    for name in EXAMPLES:
        del sys.modules[f"predictors.{name}"]
        delattr(predictors, name)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_keep_the_contract(examples: dict[str, Predictor], name: str, batch: int) -> None:
    assert isinstance(examples[name], Predictor)
    assert examples[name].name == name
    check_contract(examples[name], make_run(batch=batch))


def test_the_example_counts_transitions(examples: dict[str, Predictor]) -> None:
    run = make_run(n_sequences=1)
    routed = {(v.step, v.layer): v.topk_ids.tolist() for v in run.views}
    followed: Counter[tuple[int, int, int]] = Counter()
    n_checked = 0
    for view, predictions in show(examples["transition"], run):
        now = routed[view.step, view.layer]
        if view.layer:
            for before, after in zip(routed[view.step, view.layer - 1], now, strict=True):
                followed.update((view.layer, b, a) for b in before for a in after)
        for p in predictions:
            expected = [[sum(followed[p.layer, b, e] + 0.01 for b in token) for e in range(N_EXPERTS)] for token in now]
            torch.testing.assert_close(p.scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)
            n_checked += 1
    assert n_checked == len(run.views) * (N_LAYERS - 1) // N_LAYERS
