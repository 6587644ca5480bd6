"""Every family from a checkpoint in its real layout, offloaded, against unmodified transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from predictors.base import LayerView, Prediction
from predictors.gate_reuse import GateReuse
from prefetch.accounting import violations
from prefetch.families import family_of, moe_geometry
from prefetch.model import load_offloaded, model_view, moe_blocks
from tests.prefetch.offloaded import Setting, decode, offloaded, plain
from tests.prefetch.tiny_families import CHECKPOINTS


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CHECKPOINTS[request.param](tmp_path_factory.mktemp(request.param))


@dataclass
class Witness(GateReuse):
    """Gate reuse that also asks each layer's own norm and router what that layer's router has just said."""

    right: list[bool] = field(default_factory=list)

    def predict(self, seen: LayerView) -> list[Prediction]:
        assert seen.residual is not None
        own = self.model.router_scores(seen.layer, self.model.pre_moe_norm[seen.layer](seen.residual))
        chosen = own.topk(self.model.top_k).indices.sort().values
        self.right.append(torch.equal(chosen, seen.topk_ids.sort().values))
        return super().predict(seen)


def test_tokens_equal_unmodified_transformers(folder: Path, tmp_path: Path) -> None:
    expected_tokens, expected_logits = decode(plain(folder))
    assert len(expected_tokens.unique()) > 3, "a model that repeats itself proves little"
    witness = Witness()
    with offloaded(folder, tmp_path, Setting(n_slots=6, predictor=witness)) as (model, runtime):
        tokens, logits = decode(model)
        runtime.finish()
        record = runtime.record()
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    assert violations(record) == []
    assert set(record.forwards["step"]) == set(range(24)), "a hybrid cache knows whether a sequence is new"
    assert witness.right and all(witness.right)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_groups_and_biases_matter_to_the_choice(name: str, tmp_path: Path) -> None:
    """Otherwise the test above would not see a gate reuse that goes by logits alone."""
    model = load_offloaded(CHECKPOINTS[name](tmp_path), torch.float32)
    view = model_view(model, family_of(model.config), moe_geometry(model.config, torch.float32))
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(4))
    logits, scores = view.router_logits[0](x), view.router_scores(0, x)
    differ = logits.topk(3).indices.sort().values != scores.topk(3).indices.sort().values
    assert 0.1 < differ.any(1).float().mean() < 1


def test_no_parameter_of_a_routed_expert_is_loaded(folder: Path) -> None:
    model = load_offloaded(folder, torch.float32)
    family = family_of(model.config)
    assert [name for name, _ in model.named_parameters() if name.split(".")[-1] in family.weights] == []


def test_the_shared_expert_is_what_the_block_adds(folder: Path, tmp_path: Path) -> None:
    """The block's output less the routed experts' share, which the runtime returned."""
    with offloaded(folder, tmp_path, Setting(n_slots=10)) as (model, runtime):
        if runtime.model.shared_experts is None:
            pytest.skip("this family has no shared expert")
        layer, block = 1, moe_blocks(model, family_of(model.config))[1]
        seen: dict[str, Tensor] = {}
        block.register_forward_hook(lambda module, args, output: seen.update(hidden=args[0], output=output))
        experts = getattr(block, family_of(model.config).experts)
        experts.register_forward_hook(lambda module, args, output: seen.update(routed=output))
        decode(model, new_tokens=2)
        with torch.inference_mode():
            shared = runtime.model.shared_experts[layer](seen["hidden"])
    torch.testing.assert_close(shared.flatten(), seen["output"].flatten() - seen["routed"].flatten(), atol=1e-5, rtol=1e-4)
