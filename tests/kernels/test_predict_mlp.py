"""The predictor MLP under Triton's interpreter against float64, and against PreScope's own networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels.guesses import Guesses
from kernels.predict_mlp import MlpCall, MlpHead, predict_mlp, predict_mlp_reference
from predictors.base import LayerView
from predictors.prescope import MiddleHead, OuterHead
from prefetch.errors import KernelInputError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOGIT_ERROR = 2e-5  # logits of order 1, all sums in fp32 from the same rounded weights


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach(), layer.bias.detach()


def random_network(
    make: type[OuterHead], hidden: int, rank: int, n_experts: int, width: int, random: torch.Generator
) -> OuterHead:
    """PreScope's network with weights of unit gain, a mean that is not zero and orthonormal directions."""
    network = make(hidden, rank, n_experts, width, dropout=0.1).eval()
    network.project.mean.copy_(torch.randn(hidden, generator=random))
    network.project.directions.copy_(torch.linalg.qr(torch.randn(hidden, hidden, generator=random)).Q[:, :rank])
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=random)
    return network


def folded(network: OuterHead, dtype: torch.dtype = torch.float32) -> MlpHead:
    middle = isinstance(network, MiddleHead)
    return MlpHead.folded(
        network.project.mean,
        network.project.directions,
        weight_and_bias(network.enter),
        weight_and_bias(network.leave),
        weight_and_bias(network.gate) if middle else None,
        (weight_and_bias(network.block[0]), weight_and_bias(network.block[3])) if middle else None,
        dtype,
    )


def random_call(
    make: type[OuterHead], n_tokens: int, hidden: int, n_experts: int, width: int, top_k: int, seed: int,
    dtype: torch.dtype = torch.float32, prior: bool = False, threshold: float = -torch.inf,
) -> tuple[MlpCall, OuterHead]:  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    network = random_network(make, hidden, max(1, hidden // 2), n_experts, width, random)
    ids = torch.rand(n_tokens, n_experts, generator=random).argsort(1)[:, :top_k].contiguous()
    call = MlpCall(
        folded(network, dtype),
        torch.randn(n_tokens, hidden, generator=random).to(dtype),
        ids,
        torch.rand(n_tokens, top_k, generator=random),
        torch.randn(n_tokens, n_experts, generator=random) if prior else None,
        threshold,
    )
    return call, network


def run(call: MlpCall, n_guesses: int) -> Guesses:
    """Into poisoned memory; the arrival counts must be zero again."""
    out = call.new_result(n_guesses)
    for tensor in out:
        tensor.fill_(torch.nan if tensor.is_floating_point() else -7)
    arrivals = torch.zeros(call.n_tokens + 2, dtype=torch.int32)
    predict_mlp(call, out, arrivals)
    assert not arrivals.any()
    return out


def check_guesses(found: Guesses, n_guesses: int, threshold: float) -> None:
    """Exactly the best of the logits that were found, by sorting Python tuples."""
    for logits, ids, scores in zip(*(tensor.tolist() for tensor in found), strict=True):
        best = sorted((-logit, expert) for expert, logit in enumerate(logits))[:n_guesses]
        assert ids == [expert if -logit >= threshold else -1 for logit, expert in best]
        assert scores == [-logit if -logit >= threshold else float("-inf") for logit, _ in best]


@given(
    st.sampled_from([OuterHead, MiddleHead]), st.integers(1, 3), st.integers(1, 70), st.integers(1, 17), st.integers(1, 37),
    st.sampled_from(DTYPES), st.booleans(), st.sampled_from([-torch.inf, 0.0]), st.data(),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_any_call(
    make: type[OuterHead], n_tokens: int, hidden: int, n_experts: int, width: int, dtype: torch.dtype, prior: bool,
    threshold: float, data: st.DataObject,
) -> None:  # fmt: skip
    top_k, n_guesses, seed = (data.draw(st.integers(1, high)) for high in (n_experts, n_experts, 2**16))
    call, _ = random_call(make, n_tokens, hidden, n_experts, width, top_k, seed, dtype, prior, threshold)
    found, exact = run(call, n_guesses), predict_mlp_reference(call, n_guesses, torch.float64)
    torch.testing.assert_close(found.logits.double(), exact.logits, rtol=1e-5, atol=LOGIT_ERROR)
    check_guesses(found, n_guesses, threshold)


@pytest.mark.parametrize("make", [OuterHead, MiddleHead])
def test_it_is_the_function_that_prescope_trains(make: type[OuterHead]) -> None:
    call, network = random_call(make, 5, 48, 13, 32, 4, seed=1)
    seen = LayerView(0, 0, 0, call.x, None, call.topk_ids, call.topk_weights, torch.zeros(5, dtype=torch.int64))
    with torch.no_grad():
        logits = network(seen)
    torch.testing.assert_close(run(call, 4).logits, logits, rtol=1e-5, atol=LOGIT_ERROR)
    torch.testing.assert_close(predict_mlp_reference(call, 4).logits, logits, rtol=1e-5, atol=LOGIT_ERROR)


def test_a_block_wider_than_a_tile() -> None:
    call, _ = random_call(MiddleHead, 1, 20, 5, 150, 2, seed=2)
    exact = predict_mlp_reference(call, 3, torch.float64)
    torch.testing.assert_close(run(call, 3).logits.double(), exact.logits, rtol=1e-5, atol=LOGIT_ERROR)


def test_rounded_weights_are_centred_on_the_mean_exactly() -> None:
    """A large mean must cancel against the rounded directions, not against the unrounded ones."""
    random = torch.Generator().manual_seed(3)
    network = random_network(OuterHead, 32, 16, 5, 8, random)
    network.project.mean.mul_(1000)
    head = folded(network, torch.bfloat16)
    entries = head.entry.double() @ network.project.mean.double() + head.entry_bias.double()
    torch.testing.assert_close(entries, network.enter.bias.detach().double(), rtol=0, atol=1e-3)


def test_unknown_experts_in_the_routing_add_nothing() -> None:
    call, _ = random_call(MiddleHead, 1, 16, 6, 8, 2, seed=4)
    padded = replace(
        call,
        topk_ids=torch.cat([call.topk_ids, torch.tensor([[-1, 6]])], dim=1),
        topk_weights=torch.cat([call.topk_weights, torch.tensor([[torch.nan, 1.0]])], dim=1),
    )
    torch.testing.assert_close(run(padded, 3).logits, run(call, 3).logits, rtol=1e-6, atol=1e-6)


def test_nan_reaches_no_threshold() -> None:
    call, _ = random_call(OuterHead, 2, 16, 6, 8, 2, seed=5)
    call.x[1, 0] = torch.nan
    found = run(call, 4)
    assert (found.ids[0] >= 0).all() and (found.ids[1] == -1).all() and (found.scores[1] == -torch.inf).all()


def test_arguments_that_do_not_fit_are_refused() -> None:
    call, network = random_call(MiddleHead, 2, 16, 6, 8, 2, seed=6)
    with pytest.raises(KernelInputError, match="n_guesses = 7 must be between 1 and experts = 6"):
        call.new_result(7)
    with pytest.raises(KernelInputError, match=r"x has shape \[2, 15\], expected \[any, 16\]"):
        replace(call, x=call.x[:, :15])
    with pytest.raises(KernelInputError, match="topk_weights is float16"):
        replace(call, topk_weights=call.topk_weights.half())
    with pytest.raises(KernelInputError, match=r"entry has shape \[16, 16\], expected \[8, any\]"):
        replace(call.head, block=None)
    with pytest.raises(KernelInputError, match="gate and block come together"):
        MlpHead.folded(
            network.project.mean, network.project.directions, weight_and_bias(network.enter), weight_and_bias(network.leave),
            gate=weight_and_bias(network.enter),
        )  # fmt: skip
    with pytest.raises(KernelInputError, match="arrivals has 1 counts, this call needs 2"):
        predict_mlp(call, call.new_result(3), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(KernelInputError, match=r"logits has shape \[2, 6\], expected \[1, 6\]"):
        one = replace(call, x=call.x[:1], topk_ids=call.topk_ids[:1], topk_weights=call.topk_weights[:1])
        predict_mlp(one, call.new_result(3))
