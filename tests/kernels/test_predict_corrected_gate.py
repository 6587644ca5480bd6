"""The corrected gate's kernel under Triton's interpreter against float64, and against the network that is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from kernels.guesses import Guesses
from kernels.predict_corrected_gate import (
    CorrectedGateCall,
    CorrectedGateHead,
    predict_corrected_gate,
    predict_corrected_gate_reference,
)
from predictors.base import LayerView, ModelView
from predictors.corrected_gate import GateCorrection
from prefetch.errors import KernelInputError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOGIT_ERROR = 2e-5  # logits of order 1, all sums in fp32 from the same rounded weights


def random_call(
    n_tokens: int, hidden: int, n_experts: int, rank: int, seed: int, dtype: torch.dtype = torch.float32, offset: bool = False,
    threshold: float = -torch.inf,
) -> CorrectedGateCall:  # fmt: skip
    random = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=random) / columns**0.5

    head = CorrectedGateHead(
        norm=(1 + torch.randn(hidden, generator=random) / 4).to(dtype),
        epsilon=1e-6,
        entry=matrix(n_experts + rank, hidden).to(dtype),
        correction=matrix(n_experts, rank).to(dtype),
        offset=torch.randn(hidden, generator=random).to(dtype) if offset else None,
    )
    return CorrectedGateCall(head, (3 * torch.randn(n_tokens, hidden, generator=random)).to(dtype), threshold)


def run(call: CorrectedGateCall, n_guesses: int) -> Guesses:
    """Into poisoned memory; the arrival counts must be zero again."""
    out = call.new_result(n_guesses)
    for tensor in out:
        tensor.fill_(torch.nan if tensor.is_floating_point() else -7)
    arrivals = torch.zeros(call.n_tokens + 2, dtype=torch.int32)
    predict_corrected_gate(call, out, arrivals)
    assert not arrivals.any()
    return out


@given(
    st.integers(1, 3), st.integers(1, 90), st.integers(1, 17), st.integers(1, 37), st.sampled_from(DTYPES), st.booleans(),
    st.sampled_from([-torch.inf, 0.0]), st.integers(1, 17), st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_any_call(
    n_tokens: int, hidden: int, n_experts: int, rank: int, dtype: torch.dtype, offset: bool, threshold: float, n_guesses: int,
    seed: int,
) -> None:  # fmt: skip
    call = random_call(n_tokens, hidden, n_experts, rank, seed, dtype, offset, threshold)
    n_guesses = min(n_guesses, n_experts)
    found, exact = run(call, n_guesses), predict_corrected_gate_reference(call, n_guesses, torch.float64)
    torch.testing.assert_close(found.logits.double(), exact.logits, rtol=1e-5, atol=LOGIT_ERROR)
    for logits, ids, scores in zip(*(tensor.tolist() for tensor in found), strict=True):
        best = sorted((-logit, expert) for expert, logit in enumerate(logits))[:n_guesses]
        assert ids == [expert if -logit >= threshold else -1 for logit, expert in best]
        assert scores == [-logit if -logit >= threshold else float("-inf") for logit, _ in best]


def test_it_is_the_function_that_the_corrected_gate_trains() -> None:
    random = torch.Generator().manual_seed(1)
    norm = Qwen3MoeRMSNorm(48, eps=1e-5)
    torch.nn.init.normal_(norm.weight, mean=1, std=0.3, generator=random)
    router = torch.randn(13, 48, generator=random) / 48**0.5
    model = ModelView(2, 13, 4, 48, [lambda x: linear(x, router)] * 2, [norm, norm])
    network = GateCorrection(model, [1], rank=8, width=12)
    head = network.heads["1"]
    assert isinstance(head, nn.Sequential)
    for parameter in network.parameters():  # two branches start at zero: give them something to say
        torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=random)
    residual = 5 * torch.randn(6, 48, generator=random)
    nothing = torch.zeros(6, dtype=torch.int64)
    seen = LayerView(0, 0, 0, residual, residual, nothing[:, None], nothing[:, None].float(), nothing)
    with torch.no_grad():
        logits = network(seen, 1)
        folded = CorrectedGateHead.folded(
            norm.weight.detach(),
            1e-5,
            router,
            (network.down.weight.detach(), network.up.weight.detach()),
            (head[0].weight.detach(), head[2].weight.detach()),
        )
    call = CorrectedGateCall(folded, residual)
    torch.testing.assert_close(run(call, 4).logits, logits, rtol=1e-5, atol=LOGIT_ERROR)
    torch.testing.assert_close(predict_corrected_gate_reference(call, 4).logits, logits, rtol=1e-5, atol=LOGIT_ERROR)


def test_an_offset_moves_the_residual() -> None:
    call = random_call(2, 40, 7, 5, seed=2, offset=True)
    assert call.head.offset is not None
    moved = CorrectedGateCall(replace(call.head, offset=None), call.residual + call.head.offset)
    torch.testing.assert_close(run(call, 3).logits, run(moved, 3).logits, rtol=1e-6, atol=1e-6)


def test_more_experts_and_ranks_than_a_tile() -> None:
    call = random_call(1, 12, 70, 260, seed=3)
    exact = predict_corrected_gate_reference(call, 5, torch.float64)
    torch.testing.assert_close(run(call, 5).logits.double(), exact.logits, rtol=1e-5, atol=LOGIT_ERROR)


def test_arguments_that_do_not_fit_are_refused() -> None:
    call = random_call(2, 16, 6, 4, seed=4)
    with pytest.raises(KernelInputError, match=r"residual has shape \[2, 15\], expected \[any, 16\]"):
        CorrectedGateCall(call.head, call.residual[:, :15])
    with pytest.raises(KernelInputError, match=r"entry has shape \[9, 16\], expected \[10, any\]"):
        replace(call.head, entry=call.head.entry[:9])
    with pytest.raises(KernelInputError, match=r"norm has shape \[1, 16\], expected \[16\]"):
        replace(call.head, norm=call.head.norm[None])
    with pytest.raises(KernelInputError, match="correction is float16, expected float32"):
        replace(call.head, correction=call.head.correction.half())
    with pytest.raises(KernelInputError, match="n_guesses = 7"):
        predict_corrected_gate(call, Guesses.empty(2, 7, 7, call.residual.device)._replace(logits=torch.empty(2, 6)))
