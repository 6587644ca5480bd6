"""The draft: the network is its equations, guesses are handed over once and in time, and what it cannot know it leaves open."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from predictors.base import AttentionView, LayerView
from predictors.draft import Draft, DraftNetwork
from predictors.draft_head import TrainedDraftHead
from predictors.fitting import FitOptions, fit
from prefetch.errors import ConfigError, PredictorError
from tests.predictors.synthetic_run import HIDDEN, N_EXPERTS, N_LAYERS, TOP_K, Run, make_run, show, views_per_layer


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(n_sequences=3, batch=2)


@pytest.fixture(scope="module")
def trained(run: Run) -> Draft:
    predictor = Draft(width=16)
    fit(predictor, run.model, views_per_layer(run), views_per_layer(run), FitOptions(epochs=2, batch_rows=8))
    return predictor


def normed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(1, keepdims=True) + np.finfo(np.float32).eps) * scale


def test_the_network_is_its_equations(run: Run) -> None:
    """Against numpy in float64, written from the docstrings."""
    draft = Draft(width=24)
    draft.use(run.model)
    torch.manual_seed(0)
    draft.network = draft.build().requires_grad_(False)
    w = {}
    for name, tensor in draft.network.state_dict().items():
        if "norm" in name:
            tensor.uniform_(0.5, 2.0)  # the network's own memory: fresh norms would hide a mix-up
        w[name.removeprefix("head.")] = tensor.double().numpy()
    view = views_per_layer(run)[0]
    assert view.pre_attention is not None and view.previous_final is not None
    token = normed(view.pre_attention.double().numpy(), w["norm_token.weight"])
    final = normed(view.previous_final.double().numpy(), w["norm_final.weight"])
    joined = np.concatenate([token, final], axis=1) @ w["join.weight"].T
    inner = normed(joined, w["norm_joined.weight"]) @ w["gate_up.weight"].T
    gate, up = inner[:, :24], inner[:, 24:]
    state = joined + (gate / (1 + np.exp(-gate)) * up) @ w["down.weight"].T
    logits = normed(state, w["norm.weight"]) @ w["experts.weight"].T + w["experts.bias"]
    found = draft.logits(views_per_layer(run))
    assert set(found) == set(range(N_LAYERS))
    for layer, expected in enumerate(np.split(logits, N_LAYERS, axis=1)):
        np.testing.assert_allclose(found[layer].numpy(), expected, rtol=1e-4, atol=1e-5)


@given(hidden=st.integers(1, 40), width=st.integers(1, 40), layers=st.integers(1, 5), experts=st.integers(1, 9))
def test_parameters_are_as_documented(hidden: int, width: int, layers: int, experts: int) -> None:
    def counted(network: torch.nn.Module) -> int:
        return sum(p.numel() for p in network.parameters())

    assert counted(TrainedDraftHead(hidden, width)) == 2 * hidden**2 + 3 * hidden * width + 3 * hidden
    assert counted(DraftNetwork(None, hidden, layers, experts)) == hidden + layers * experts * (hidden + 1)


@pytest.mark.parametrize("lookahead", range(1, N_LAYERS))
def test_every_layer_is_named_once_and_as_early_as_allowed(lookahead: int, trained: Draft, run: Run) -> None:
    draft = dataclasses.replace(trained, lookahead=lookahead)
    draft.network = trained.network
    named = [(v.sequence, v.step, v.layer, p.layer) for v, given_now in show(draft, run) for p in given_now]
    passes = sorted({(v.sequence, v.step) for v in run.views if v.step > 0})
    expected = [(*one, max(0, target - lookahead), target) for one in passes for target in range(N_LAYERS)]
    assert named == expected


def test_live_guesses_are_those_of_training(trained: Draft, run: Run) -> None:
    """Each token's scores, row for row, from the batch of all recorded tokens and from its own forward pass."""
    whole = trained.logits(views_per_layer(run))
    first_rows, n_rows = {}, 0
    for view in (v for v in run.views if v.layer == 0):
        first_rows[view.sequence, view.step] = n_rows
        n_rows += len(view.token_ids)
    for view, predictions in show(trained, run):
        row = first_rows[view.sequence, view.step]
        for p in predictions:
            torch.testing.assert_close(p.scores, whole[p.layer][row : row + 2], rtol=1e-4, atol=1e-5)


def test_it_reads_both_the_token_and_what_came_before() -> None:
    """Experts that depend on both, so that neither alone tells them: a table over two coarse features."""

    def cases(seed: int, n: int) -> list[LayerView]:
        random = torch.Generator().manual_seed(seed)
        one, other = (torch.randint(4, (n,), generator=random) for _ in range(2))
        states = [torch.nn.functional.one_hot(x, HIDDEN).float() * 3 for x in (one, other)]
        noise = torch.randn(2, n, HIDDEN, generator=random) * 0.1
        ids = torch.stack([(one + other) % 4, 4 + (one + other) % 4], dim=1)
        return [
            LayerView(
                layer, 0, 0, torch.zeros(n, HIDDEN), None, ids, torch.full((n, TOP_K), 0.5), one,
                pre_attention=states[0] + noise[0], previous_final=states[1] + noise[1],
            )
            for layer in range(N_LAYERS)
        ]  # fmt: skip

    draft = Draft(width=32)
    found = fit(draft, make_run().model, cases(0, 2048), cases(1, 256), FitOptions(epochs=30, batch_rows=64))
    assert max(found.recalls) > 0.95  # either feature alone: a quarter


def own_head(seen: LayerView | AttentionView) -> torch.Tensor:
    """A model's own draft head, of any kind that answers token by token."""
    assert seen.previous_final is not None
    return seen.previous_final.flip(1) + seen.token_ids[:, None] / 50


def test_a_models_own_draft_head_is_used_as_it_is(run: Run, trained: Draft, tmp_path: Path) -> None:
    model = dataclasses.replace(run.model, draft_head=own_head)
    views, draft = views_per_layer(run), Draft()
    fit(draft, model, views, views, FitOptions(epochs=2, batch_rows=8))
    assert draft.n_parameters() == HIDDEN + N_LAYERS * N_EXPERTS * (HIDDEN + 1)  # no head was trained
    assert draft.network is not None
    w = {name: tensor.double().numpy() for name, tensor in draft.network.state_dict().items()}
    expected = normed(own_head(views[0]).double().numpy(), w["norm.weight"]) @ w["experts.weight"].T + w["experts.bias"]
    found = torch.cat(list(draft.logits(views).values()), dim=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    draft.save(tmp_path / "own.safetensors", {})
    with pytest.raises(PredictorError, match="trained for draft head=\"the model's own\", here it is 'trained'"):
        Draft(weights=str(tmp_path / "own.safetensors")).bind(run.model)


def test_an_own_draft_head_that_gives_another_shape_is_refused(run: Run) -> None:
    model = dataclasses.replace(run.model, draft_head=lambda seen: own_head(seen)[:, 1:])
    with pytest.raises(PredictorError, match=r"draft head gave a state of shape \(\d+, 15\), expected \(\d+, 16\)"):
        fit(Draft(), model, views_per_layer(run), views_per_layer(run), FitOptions(epochs=1, batch_rows=8))


def test_a_prefill_is_left_open(trained: Draft, run: Run) -> None:
    first = run.views[0]
    early = dataclasses.replace(first, previous_final=None).before_attention
    assert first.step == 0 and trained.predict_before_attention(early) == []


def test_a_recording_without_the_final_state_is_refused(trained: Draft, run: Run) -> None:
    views = [dataclasses.replace(view, previous_final=None) for view in views_per_layer(run)]
    with pytest.raises(PredictorError, match="MoE layer 0 lack 'previous_final'"):
        fit(Draft(), run.model, views, views, FitOptions(epochs=1, batch_rows=8))
    decoding = next(view for view in run.views if view.step == 1)
    trained.bind(run.model)
    with pytest.raises(PredictorError, match="MoE layer 0 was recorded without 'previous_final'"):
        trained.predict_before_attention(dataclasses.replace(decoding, previous_final=None).before_attention)


def test_impossible_knobs_are_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="predictor.width=0"):
        Draft(width=0).use(run.model)
    with pytest.raises(ConfigError, match="predictor.weights is not set"):
        Draft().bind(run.model)


def test_weights_of_another_model_or_width_are_refused(trained: Draft, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "draft.safetensors"
    trained.save(path, {})
    again = Draft(width=16, lookahead=1, weights=str(path))  # lookahead is no property of the weights
    again.bind(run.model)
    assert again.n_parameters() == trained.n_parameters()
    with pytest.raises(PredictorError, match="trained for predictor.width=16, here it is 8"):
        Draft(width=8, weights=str(path)).bind(run.model)
    with pytest.raises(PredictorError, match="trained for another model"):
        Draft(width=16, weights=str(path)).bind(dataclasses.replace(run.model, fingerprint="another"))
