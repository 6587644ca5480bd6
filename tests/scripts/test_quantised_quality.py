"""The quality report on a tiny random model, against transformers' own loss and routers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from kernels.quantised import QuantFormat, dequantise, quantise
from scripts.quantised_quality import FORMATS, compare, observe, quantised_experts
from tests.conftest import qwen3_config, randomise_routers

WINDOWS = torch.randint(0, 64, (3, 41), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Qwen3MoeForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(qwen3_config(moe_intermediate_size=32)).eval()
        randomise_routers(model)
    return model


def experts(model: Qwen3MoeForCausalLM) -> list[torch.Tensor]:
    return [getattr(layer.mlp.experts, name) for layer in model.model.layers for name in ("gate_up_proj", "down_proj")]


def test_bits_and_routing_are_those_of_transformers(model: Qwen3MoeForCausalLM) -> None:
    seen = observe(model, WINDOWS, lambda: None)
    with torch.inference_mode():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in WINDOWS]
        logits = model(input_ids=WINDOWS[:, :-1], output_router_logits=True).router_logits
    assert seen.bits_per_byte == pytest.approx(sum(losses) / len(losses) / math.log(2), rel=1e-5)
    for ids, layer in zip(seen.topk_ids, logits, strict=True):
        assert torch.equal(ids.sort(1).values, layer.topk(2, dim=-1).indices.sort(1).values)


def test_experts_are_quantised_inside_and_restored_after(model: Qwen3MoeForCausalLM) -> None:
    before, how = [weight.detach().clone() for weight in experts(model)], QuantFormat("int4", 32)
    with pytest.raises(RuntimeError, match="stop"), quantised_experts(model, how) as error:
        for weight, old in zip(experts(model), before, strict=True):
            for expert in range(len(old)):
                assert torch.equal(weight[expert], dequantise(quantise(old[expert], how), how))
        change = torch.cat([(new - old).flatten() for new, old in zip(experts(model), before, strict=True)]).detach()
        assert error == pytest.approx(float(change.norm() / torch.cat([old.flatten() for old in before]).norm()), rel=1e-4)
        raise RuntimeError("stop")
    assert all(torch.equal(weight, old) for weight, old in zip(experts(model), before, strict=True))


def test_what_a_format_represents_costs_nothing(model: Qwen3MoeForCausalLM) -> None:
    how = QuantFormat("mxfp4", 32)
    for weight in experts(model):
        weight.data = dequantise(quantise(weight.data.flatten(0, 1), how), how).view_as(weight)
    plain, *found = compare(model, WINDOWS)
    by_name = {quality.name: quality for quality in found}
    assert set(by_name) == {str(how) for how in FORMATS}
    exact = by_name[str(how)]
    assert (exact.weight_error, exact.bits_per_byte, exact.agreement) == (0, plain.bits_per_byte, 1)
    assert by_name["int4 per 32"].weight_error > 0.01 and by_name["int4 per 32"].bits_per_byte != plain.bits_per_byte
    assert [quality.bits_per_weight for quality in found] == [8.5, 9.0, 4.5, 4.25]  # fp8: 32 bits of scale for 32 columns
