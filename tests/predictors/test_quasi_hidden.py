"""Quasi-hidden and its default vectors against a plain transformers model, in float64 and one token at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from predictors.base import LayerView
from predictors.gate_reuse import GateReuse
from predictors.quasi_hidden import QuasiHidden, default_vectors, save
from prefetch.errors import ConfigError, PredictorError
from prefetch.geometry import ExpertKey
from tests.predictors.synthetic_run import HIDDEN, N_EXPERTS, N_LAYERS, make_run, show

N_TOKENS = 30


@pytest.fixture(scope="module")
def model(tiny_qwen3: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def views(model: PreTrainedModel) -> list[LayerView]:
    """Random router inputs and choices; expert 0 of layer 1 is never used."""
    random = torch.Generator().manual_seed(0)
    found = []
    for layer, block in enumerate(model.model.layers):
        hidden = torch.randn(N_TOKENS, model.config.hidden_size, generator=random)
        with torch.no_grad():
            logits = block.mlp.gate(hidden)[0]
        logits[:, 0] -= 1e3 * (layer == 1)
        weights, ids = logits.softmax(-1).topk(2)
        found.append(LayerView(layer, 0, 0, hidden, hidden, ids, weights, ids[:, 0]))
    return found


def expert_weights(model: PreTrainedModel, key: ExpertKey) -> tuple[Tensor, Tensor]:
    experts = model.model.layers[key.layer].mlp.experts
    return experts.gate_up_proj[key.expert].detach(), experts.down_proj[key.expert].detach()


def test_default_vectors_are_mean_outputs_over_the_tokens_that_were_routed_there(
    model: PreTrainedModel, views: list[LayerView]
) -> None:
    n_advanced: list[int] = []
    found = default_vectors(views, 8, lambda key: expert_weights(model, key), lambda: n_advanced.append(1))
    expected = torch.zeros(3, 8, 32, dtype=torch.float64)
    for view in views:
        for expert in range(8):
            gate_up, down = (w.double() for w in expert_weights(model, ExpertKey(view.layer, expert)))
            outputs = []
            for hidden, ids in zip(view.hidden.double(), view.topk_ids.tolist(), strict=True):
                if expert in ids:
                    gate, up = (gate_up @ hidden).chunk(2)
                    outputs.append(down @ (gate * torch.sigmoid(gate) * up))
            if outputs:
                expected[view.layer, expert] = torch.stack(outputs).mean(0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert not found[1, 0].any() and found.any(dim=2).sum() > 20
    assert len(n_advanced) == 3 * 8


@pytest.mark.parametrize("lookahead", [1, 2])
def test_the_target_reads_the_residual_plus_weighted_default_vectors(lookahead: int) -> None:
    run, n_checked = make_run(batch=2), 0
    predictor = QuasiHidden(lookahead)
    calls = show(predictor, run)
    for view, predictions in calls:
        for p in predictions:
            assert predictor.vectors is not None and view.residual is not None
            stream = view.residual.double()
            for token in range(len(stream)):
                for weight, expert in zip(view.topk_weights[token], view.topk_ids[token], strict=True):
                    stream[token] = stream[token] + weight.double() * predictor.vectors[view.layer, expert].double()
            hidden = stream / stream.square().mean(-1, keepdim=True).sqrt()
            router = run.model.router_logits[p.layer](torch.eye(HIDDEN)).T.double()
            torch.testing.assert_close(p.scores.double(), hidden @ router.T, rtol=1e-4, atol=1e-4)
            n_checked += 1
    assert n_checked == len(run.views) * (N_LAYERS - lookahead) // N_LAYERS


def test_with_the_true_outputs_and_no_attention_the_state_is_not_stale() -> None:
    """A model whose next residual is exactly residual + gate-weighted constants: quasi-hidden names its choice, gate reuse does not."""
    made = make_run()
    vectors = torch.randn(N_LAYERS, N_EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    n_stale = 0
    for view in (view for view in made.views if view.layer + 1 < N_LAYERS):
        assert view.residual is not None
        moved = view.residual + (view.topk_weights[:, :, None] * vectors[view.layer][view.topk_ids]).sum(1)
        target = view.layer + 1
        chosen = made.model.router_logits[target](made.model.pre_moe_norm[target](moved)).topk(2).indices
        for predictor in (QuasiHidden(), GateReuse()):
            predictor.vectors = vectors  # type: ignore[attr-defined]
            predictor.bind(made.model)
            same = torch.equal(predictor.predict(view)[0].scores.topk(2).indices, chosen)
            assert same or type(predictor) is GateReuse
            n_stale += not same
    assert n_stale > 10


def test_stored_vectors_are_those_measured_to_the_precision_of_their_type(tmp_path: Path) -> None:
    model, path = make_run().model, tmp_path / "vectors.safetensors"
    vectors = torch.randn(N_LAYERS, N_EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(1))
    save(path, vectors, model, {"tokens": 1})
    predictor = QuasiHidden(weights=str(path))
    predictor.bind(model)
    assert predictor.vectors is not None
    torch.testing.assert_close(predictor.vectors, vectors, rtol=2**-8, atol=0)
    assert predictor.n_parameters() == N_LAYERS * N_EXPERTS * HIDDEN


def test_refuses_vectors_that_are_missing_or_of_another_model(tmp_path: Path) -> None:
    model, path = make_run().model, tmp_path / "vectors.safetensors"
    with pytest.raises(ConfigError, match=r"needs default vectors: measure them with python -m experiments.default_vectors"):
        QuasiHidden().bind(model)
    with pytest.raises(PredictorError, match=r"vectors.safetensors: no such predictor weights"):
        QuasiHidden(weights=str(path)).bind(model)
    save(path, torch.zeros(N_LAYERS, N_EXPERTS, HIDDEN), model, {})
    with pytest.raises(PredictorError, match=r"the weights of its routers differ"):
        QuasiHidden(weights=str(path)).bind(dataclasses.replace(model, fingerprint="another"))
    save(path, torch.zeros(N_LAYERS, N_EXPERTS, HIDDEN - 1), model, {})
    with pytest.raises(PredictorError, match=rf"vectors has shape \(4, 8, 15\), this predictor expects \(4, 8, {HIDDEN}\)"):
        QuasiHidden(weights=str(path)).bind(model)
