"""What an MoE call means: the reference against other code, and the arguments that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from kernels.expert_mlp import expert_mlp
from kernels.gated_activation import CLAMPED_SWIGLU
from kernels.moe_call import MoECall, moe_mlp_reference
from prefetch.errors import KernelInputError
from tests.kernels.random_moe import Sizes, poisoned, random_call

SIZES = Sizes(n_tokens=5, hidden=24, intermediate=10, n_experts=7, top_k=3)


def test_reference_is_the_cpu_path_pair_by_pair() -> None:
    call = random_call(SIZES, torch.float32, seed=0, addends=True)
    assert call.shared is not None and call.residual is not None
    expected = call.shared + call.residual
    for token in range(call.n_tokens):
        for expert, weight in zip(call.ids[token].tolist(), call.weights[token], strict=True):
            found = call.table.expert(1, expert)
            assert found is not None
            expected[token] += weight * expert_mlp(call.x[token : token + 1], *found)[0]
    out, missed = moe_mlp_reference(call)
    assert not missed
    torch.testing.assert_close(out, expected)


def test_clamped_reference_is_gpt_oss_of_transformers() -> None:
    """Inputs four times as large as usual, so that both limits are reached. transformers alternates gate and up columns."""
    call = random_call(SIZES, torch.float32, seed=1, biases=True, activation=CLAMPED_SWIGLU)
    call = replace(call, x=4 * call.x)
    config = GptOssConfig(num_local_experts=7, hidden_size=24, intermediate_size=10, experts_implementation="eager")
    theirs = GptOssExperts(config)
    gate_up, down = zip(*(call.table.expert(1, expert) or () for expert in range(7)), strict=True)
    assert call.gate_up_bias is not None and call.down_bias is not None
    with torch.no_grad():
        theirs.gate_up_proj.copy_(torch.stack(gate_up).unflatten(1, (2, 10)).permute(0, 3, 2, 1).reshape(7, 24, 20))
        theirs.gate_up_proj_bias.copy_(call.gate_up_bias.unflatten(1, (2, 10)).transpose(1, 2).reshape(7, 20))
        theirs.down_proj.copy_(torch.stack(down).transpose(1, 2))
        theirs.down_proj_bias.copy_(call.down_bias)
        expected = theirs(call.x, call.ids.long(), call.weights)
    inner = call.x @ gate_up[0].T
    assert inner.max() > 7 > -7 > inner.min()
    torch.testing.assert_close(moe_mlp_reference(call)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(5, 24, dtype=torch.float16)}, "x is float16, expected float32"),
        ({"x": torch.zeros(5, 25)}, r"x has shape \[5, 25\], expected \[any, 24\]"),
        ({"x": torch.zeros(24, 5).T}, "x has strides .* make it contiguous"),
        ({"x": torch.zeros(5, 24, device="meta")}, "ids is on cpu, expected meta"),
        ({"x": torch.zeros(5 * 24 + 1)[1:].view(5, 24)}, "x starts 4 bytes past a multiple of 16"),
        ({"x": torch.zeros(0, 24), "ids": torch.zeros(0, 3).int(), "weights": torch.zeros(0, 3)}, "no size may be 0"),
        ({"ids": torch.zeros(5, 3)}, "ids is float32, expected int32 or int64"),
        ({"ids": torch.zeros(4, 3).int()}, r"ids has shape \[4, 3\], expected \[5, any\]"),
        ({"ids": torch.zeros(5, 8).int(), "weights": torch.zeros(5, 8)}, "ids has 8 experts a token, the table only 7"),
        ({"weights": torch.zeros(5, 2)}, r"weights has shape \[5, 2\], expected \[5, 3\]"),
        ({"weights": torch.zeros(5, 3).half()}, "weights is float16"),
        ({"gate_up_bias": torch.zeros(7, 20)}, "pass both or neither"),
        ({"gate_up_bias": torch.zeros(7, 19), "down_bias": torch.zeros(7, 24)}, "gate_up_bias has shape"),
        ({"shared": torch.zeros(5, 23)}, "shared has shape"),
        ({"residual": torch.zeros(5, 24).double()}, "residual is float64"),
    ],
)
def test_arguments_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        random_call(SIZES, torch.float32, seed=0, **changes)


def test_outputs_that_are_refused() -> None:
    call = random_call(SIZES, torch.float32, seed=0)
    out, missed = poisoned(call)
    with pytest.raises(KernelInputError, match="out is x"):
        call.check_outputs(call.x, missed)
    with pytest.raises(KernelInputError, match="out is bfloat16"):
        call.check_outputs(out.bfloat16(), missed)
    with pytest.raises(KernelInputError, match="missed is int64"):
        call.check_outputs(out, missed.long())


def test_layer_out_of_range_is_refused() -> None:
    call: MoECall = random_call(SIZES, torch.float32, seed=0)
    with pytest.raises(KernelInputError, match="layer"):
        call.table.arguments(2)
