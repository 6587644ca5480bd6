"""Trained predictors: what is loaded must fit what it was trained for, and training must learn, repeat itself and refuse bad data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from predictors import weights as weights_file
from predictors.base import LayerView, ModelView
from predictors.fitting import FitOptions, fit
from predictors.learned import LearnedPredictor, OneHeadPerTarget, Truth
from prefetch.errors import ConfigError, PredictorError
from tests.predictors.synthetic_run import N_LAYERS, Run, make_run, show, views_per_layer

QUICK = FitOptions(epochs=3, batch_rows=32)


class LinearHead(nn.Module):
    def __init__(self, model: ModelView):
        super().__init__()
        self.map = nn.Linear(model.hidden_size, model.n_experts)

    def forward(self, seen: LayerView) -> Tensor:
        return self.map(seen.hidden)


@dataclass
class Linear(LearnedPredictor):
    scale: float = 1.0

    name = "linear"

    def build(self) -> nn.Module:
        return OneHeadPerTarget({target: LinearHead(self.model) for target in self.targets()})

    def loss(self, logits: Tensor, truth: Truth) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self.scale * logits, truth.chosen)


@pytest.fixture(scope="module")
def run() -> Run:
    made = make_run(n_sequences=40)
    return dataclasses.replace(made, model=dataclasses.replace(made.model, fingerprint="routers one"))


@pytest.fixture(scope="module")
def trained(run: Run) -> Linear:
    predictor = Linear()
    fit(predictor, run.model, views_per_layer(run), views_per_layer(make_run(8, seed=1)), QUICK)
    return predictor


@pytest.fixture
def file(trained: Linear, tmp_path: Path) -> Path:
    trained.save(tmp_path / "linear.safetensors", {"why": "a test"}, torch.float32)
    return tmp_path / "linear.safetensors"


def test_loaded_weights_say_what_was_trained(trained: Linear, file: Path, run: Run) -> None:
    loaded = Linear(weights=str(file))
    loaded.bind(run.model)
    for (_, ours), (_, theirs) in zip(show(loaded, run), show(trained, run), strict=True):
        assert [p.layer for p in ours] == [p.layer for p in theirs]
        assert all(torch.equal(a.scores, b.scores) for a, b in zip(ours, theirs, strict=True))
        assert all(torch.equal(loaded.probabilities(p), trained.probabilities(p)) for p in ours)
    assert weights_file.training_record(file) == {"why": "a test"}


def test_live_scores_are_those_of_the_training_batch(trained: Linear, run: Run) -> None:
    views = views_per_layer(run)
    for source in range(N_LAYERS - 1):
        live = [p.scores for view, found in show(trained, run) if view.layer == source for p in found]
        head = trained.network.heads[str(source + 1)].map
        torch.testing.assert_close(torch.cat(live), views[source].hidden @ head.weight.T + head.bias)


MISMATCHES: list[tuple[Callable[[ModelView], ModelView], dict[str, Any], str]] = [
    (lambda m: dataclasses.replace(m, n_layers=5), {}, "trained for MoE layers=4, here it is 5"),
    (lambda m: dataclasses.replace(m, n_experts=9), {}, "trained for experts=8, here it is 9"),
    (lambda m: dataclasses.replace(m, top_k=3), {}, "trained for top_k=2, here it is 3"),
    (lambda m: dataclasses.replace(m, hidden_size=17), {}, "trained for hidden_size=16, here it is 17"),
    (lambda m: dataclasses.replace(m, fingerprint="other"), {}, "trained for another model: the weights of its routers differ"),
    (lambda m: m, {"lookahead": 2}, "trained for predictor.lookahead=1, here it is 2"),
    (lambda m: m, {"scale": 2.0}, "trained for predictor.scale=1.0, here it is 2.0"),
]


@pytest.mark.parametrize(("change", "knobs", "said"), MISMATCHES)
def test_weights_of_something_else_are_refused_by_name(
    change: Callable[[ModelView], ModelView], knobs: dict[str, Any], said: str, file: Path, run: Run
) -> None:
    with pytest.raises(PredictorError, match=said):
        Linear(weights=str(file), **knobs).bind(change(run.model))


def test_weights_of_another_family_are_refused(file: Path, run: Run) -> None:
    class Other(Linear):
        name = "other"

    with pytest.raises(PredictorError, match="trained for family='linear', here it is 'other'"):
        Other(weights=str(file)).bind(run.model)


def test_damaged_files_are_refused(file: Path, run: Run) -> None:
    whole = file.read_bytes()
    for damaged, said in (
        (whole[: len(whole) // 2], "truncated or damaged"),
        (whole[:4], "truncated or damaged"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "their checksum differs"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(PredictorError, match=said):
            Linear(weights=str(file)).bind(run.model)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(PredictorError, match="its format is None"):
        Linear(weights=str(file)).bind(run.model)
    with pytest.raises(PredictorError, match="no such predictor weights"):
        Linear(weights=str(file) + "x").bind(run.model)


def test_a_file_with_other_tensors_or_numbers_is_refused(file: Path, run: Run) -> None:
    predictor = Linear(weights=str(file))
    predictor.use(run.model)
    good = load_file(file)
    name = "network.heads.1.map.bias"
    for changed, said in (
        ({n: t for n, t in good.items() if n != name}, "lacks 'heads.1.map.bias'"),
        (good | {name: torch.zeros(3)}, r"heads.1.map.bias has shape \(3,\)"),
        (good | {name: torch.full((8,), torch.nan)}, "holds numbers that are not finite"),
    ):
        weights_file.write(file, changed, predictor.identity(), {})
        with pytest.raises(PredictorError, match=said):
            Linear(weights=str(file)).bind(run.model)


def test_neither_weights_nor_training(run: Run) -> None:
    with pytest.raises(ConfigError, match="python -m experiments.train predictor=linear"):
        Linear().bind(run.model)


def test_an_interrupted_save_leaves_the_old_file(file: Path, trained: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(weights_file.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        trained.save(file, {})
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_training_learns_and_repeats_itself(run: Run) -> None:
    views, held_out = views_per_layer(run), views_per_layer(make_run(8, seed=0))
    options = FitOptions(epochs=8, batch_rows=32, learning_rate=1e-2, patience=8)
    reports = [fit(one := Linear(), run.model, views, held_out, options) and one.network.state_dict() for _ in range(2)]
    assert all(torch.equal(reports[0][name], reports[1][name]) for name in reports[0])
    report = fit(Linear(), run.model, views, held_out, options)
    assert report.recalls[report.best_epoch] == max(report.recalls) > report.recalls[0] + 0.2
    assert report.losses[-1] < report.losses[0]
    kept = sum(report.recall_per_target.values()) / len(report.recall_per_target)
    assert kept == pytest.approx(max(report.recalls))


def test_training_stops_when_held_out_recall_does_not_improve(run: Run) -> None:
    views = views_per_layer(run)
    report = fit(Linear(), run.model, views, views, FitOptions(epochs=50, batch_rows=32, learning_rate=0.0, patience=2))
    assert len(report.losses) == 2 and report.best_epoch == 0


def spoilt(views: list[LayerView], **states: Any) -> list[LayerView]:
    return [*views[:-1], dataclasses.replace(views[-1], **states)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda v: spoilt(v, hidden=v[-1].hidden.clone().index_fill_(0, torch.tensor([3]), torch.nan)),
            "layer 3: hidden holds NaN",
        ),
        (lambda v: spoilt(v, hidden=v[-1].hidden[:, :9]), "hidden has 9 numbers a token, the model's hidden size is 16"),
        (lambda v: v[:-1], "have 3 MoE layers, the model has 4"),
        (lambda v: spoilt(v, topk_ids=v[-1].topk_ids[:, :1]), "route to 1 experts a token, the model to 2"),
        (lambda v: [dataclasses.replace(x, token_ids=x.token_ids[:5]) for x in v], "too little training data: 5 tokens"),
    ],
)
def test_bad_data_are_refused(change: Callable[[list[LayerView]], list[LayerView]], said: str, run: Run) -> None:
    views = views_per_layer(run)
    with pytest.raises(PredictorError, match=said):
        fit(Linear(), run.model, change(views), views, QUICK)


def test_a_missing_feature_is_named(run: Run) -> None:
    class Wants(Linear):
        needs_pre_attention = True

    views = [dataclasses.replace(view, pre_attention=None) for view in views_per_layer(run)]
    with pytest.raises(PredictorError, match="lack 'pre_attention'"):
        fit(Wants(), run.model, views, views, QUICK)


def test_divergence_is_an_error(run: Run) -> None:
    views = views_per_layer(run)
    with pytest.raises(PredictorError, match="diverged"):
        fit(Linear(scale=float("inf")), run.model, views, views, QUICK)
