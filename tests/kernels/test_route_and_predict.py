"""The router kernel under Triton's interpreter against float64, and its PyTorch reference against transformers' own routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from kernels.route_and_predict import route_and_predict
from kernels.router_call import Routed, RouterCall, route_and_predict_reference
from kernels.routing import Routing, route_reference
from prefetch.errors import KernelInputError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOGIT_ERROR = 1e-5  # of unit-scale sums of at most 1,100 products in fp32; inputs are the same rounded numbers
DEEPSEEK = {"score": "sigmoid", "renormalise": True, "scaling_factor": 2.5}


def random_call(
    n_tokens: int, n_experts: int, hidden: int, routing: Routing, n_heads: int = 0, n_guesses: int = 0,
    dtype: torch.dtype = torch.float32, seed: int = 0, bias: bool = False, selection_bias: bool = False,
) -> RouterCall:  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    return RouterCall(
        torch.randn(n_tokens, hidden, generator=random).to(dtype),
        (torch.randn(1 + n_heads, n_experts, hidden, generator=random) / hidden**0.5).to(dtype),
        routing,
        n_guesses,
        torch.randn(1 + n_heads, n_experts, generator=random) if bias else None,
        torch.randn(n_experts, generator=random) if selection_bias else None,
    )


def run(call: RouterCall) -> Routed:
    """Into poisoned memory; the arrival counts, more than needed, must be zero again."""
    out = call.new_result()
    for tensor in out:
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    arrivals = torch.zeros((1 + call.n_heads) * call.n_blocks + 3, dtype=torch.int32)
    route_and_predict(call, out, arrivals)
    assert not arrivals.any()
    return out


def check(call: RouterCall) -> None:
    """Logits are float64's to rounding; ids are exactly those that the rule selects among the kernel's own logits."""
    found, exact = run(call), route_and_predict_reference(call, torch.float64)
    torch.testing.assert_close(found.logits.double(), exact.logits, rtol=0, atol=LOGIT_ERROR)
    ids, weights = route_reference(found.logits[0].double(), call.routing, call.selection_bias)
    same = (found.topk_ids == ids).all(1)
    assert (same | _nearly_tied(found, call)).all()
    torch.testing.assert_close(found.topk_weights[same].double(), weights[same], rtol=1e-5, atol=1e-7)
    order = torch.sort(found.logits[1:], dim=-1, descending=True, stable=True)
    assert torch.equal(found.head_ids, order.indices[..., : call.n_guesses].int())
    assert torch.equal(found.head_scores, order.values[..., : call.n_guesses])


def _nearly_tied(found: Routed, call: RouterCall) -> Tensor:
    """Whether the choice of a row hangs on the last bits of a score, which exp in fp32 and in float64 round apart."""
    if call.routing.chooses_by_logit(call.selection_bias is not None):
        return torch.zeros(call.n_tokens, dtype=torch.bool)
    logits = found.logits[0].double()
    scores = logits.softmax(-1) if call.routing.score == "softmax" else logits.sigmoid()
    choice = scores if call.selection_bias is None else scores + call.selection_bias.double()
    groups = choice.view(call.n_tokens, call.routing.n_groups, -1)
    sums = groups.topk(min(2, groups.shape[2]), dim=-1).values.sum(-1)
    gaps = torch.cat([choice.sort(-1).values.diff(dim=-1), sums.sort(-1).values.diff(dim=-1)], dim=1)
    return (gaps < 1e-6).any(1)


@st.composite
def drawn_calls(draw: st.DrawFn) -> RouterCall:
    group_size = draw(st.sampled_from([1, 2, 3, 5, 7, 11, 13]))
    n_groups = draw(st.integers(1, 4))
    n_kept = draw(st.integers(1, n_groups))
    n_heads = draw(st.integers(0, 2))
    routing = Routing(
        top_k=draw(st.integers(1, n_kept * group_size)),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalise=draw(st.booleans()),
        scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        n_groups=n_groups,
        n_kept_groups=n_kept,
        group_score="best" if group_size == 1 else draw(st.sampled_from(["best", "two_best"])),
    )
    return random_call(
        draw(st.sampled_from([1, 2, 4, 5, 17])), n_groups * group_size, draw(st.integers(1, 150)), routing, n_heads,
        draw(st.integers(1, n_groups * group_size)) if n_heads else 0, draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 2**16)), draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip


@given(drawn_calls())
@settings(max_examples=25, deadline=None)
def test_any_call(call: RouterCall) -> None:
    check(call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [1, 20])
def test_k_and_m_may_be_all_of_a_prime_number_of_experts(n_tokens: int, dtype: torch.dtype) -> None:
    check(random_call(n_tokens, 13, 70, Routing(13), n_heads=1, n_guesses=13, dtype=dtype))


def test_hidden_states_longer_than_a_tile_and_rows_longer_than_a_warp() -> None:
    check(random_call(1, 150, 1100, Routing(4), n_heads=1, n_guesses=2))
    check(random_call(6, 33, 300, Routing(4), n_heads=1, n_guesses=6))


def test_equal_scores_go_to_the_lower_id() -> None:
    for n_tokens in (1, 5):
        call = random_call(n_tokens, 11, 8, Routing(5, renormalise=True), n_heads=1, n_guesses=4)
        call.weights.zero_()
        found = run(call)
        assert found.topk_ids.tolist() == [[0, 1, 2, 3, 4]] * n_tokens and (found.topk_weights == 0.2).all()
        assert found.head_ids.tolist() == [[[0, 1, 2, 3]] * n_tokens]


def test_zero_ties_with_minus_zero() -> None:
    call = random_call(1, 4, 1, Routing(4), bias=True)
    assert call.bias is not None
    call.weights.zero_()
    call.bias.copy_(torch.tensor([[-1.0, -0.0, 0.0, 1.0]]))
    assert run(call).topk_ids.tolist() == [[3, 1, 2, 0]]


@pytest.mark.parametrize("n_tokens", [2, 6])
@pytest.mark.parametrize("options", [{}, {**DEEPSEEK, "n_groups": 3, "n_kept_groups": 2}])
def test_nan_rows_have_ids_in_range_and_nan_weights(n_tokens: int, options: dict[str, Any]) -> None:
    call = random_call(n_tokens, 9, 20, Routing(5, **options), 1, 9, selection_bias=bool(options))
    call.x[1, 3] = torch.nan
    found = run(call)
    for ids in (found.topk_ids, found.head_ids[0]):
        assert (ids >= 0).all() and (ids < 9).all() and all(len(set(row)) == len(row) for row in ids.tolist())
    assert found.topk_weights[1].isnan().all() and found.topk_weights[[0, *range(2, n_tokens)]].isfinite().all()


def test_an_expert_whose_logit_is_nan_comes_last() -> None:
    call = random_call(1, 6, 20, Routing(6, "sigmoid"), 1, 6)
    call.weights[:, 2] = torch.nan
    found = run(call)
    assert found.topk_ids[0, -1] == 2 and found.head_ids[0, 0, -1] == 2
    assert found.topk_weights[0].isnan().tolist() == [False] * 5 + [True]


def test_scores_too_small_for_fp32_still_rank_by_logit() -> None:
    call = random_call(1, 4, 1, Routing(4), bias=True)
    assert call.bias is not None
    call.weights.zero_()
    call.bias.copy_(torch.tensor([[-300.0, -200.0, 0.0, -250.0]]))
    found = run(call)
    assert found.topk_ids.tolist() == [[2, 1, 3, 0]] and found.topk_weights.tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("router", "routing"),
    [
        (
            Qwen3MoeTopKRouter(Qwen3MoeConfig(hidden_size=24, num_experts=12, num_experts_per_tok=3, norm_topk_prob=False)),
            Routing(3),
        ),
        (
            MixtralTopKRouter(MixtralConfig(hidden_size=24, num_local_experts=12, num_experts_per_tok=3)),
            Routing(3, renormalise=True),
        ),
        (
            GptOssTopKRouter(GptOssConfig(hidden_size=24, num_local_experts=12, num_experts_per_tok=3)),
            Routing(3, renormalise=True),
        ),
        (
            DeepseekV3TopkRouter(
                DeepseekV3Config(hidden_size=24, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2)
            ),
            Routing(3, "sigmoid", True, 2.5, n_groups=4, n_kept_groups=2),
        ),
    ],
    ids=["Qwen3-MoE", "Mixtral", "gpt-oss", "DeepSeek-V3"],
)
def test_transformers_routers_agree(router: nn.Module, routing: Routing, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(tensor.shape, generator=random) for name, tensor in router.state_dict().items()}
    router.load_state_dict(tensors)
    x = torch.randn(7, 24, generator=random)
    _, weights, ids = router(x)
    bias = tensors.get("bias")
    call = RouterCall(
        x, tensors["weight"][None], routing, 0, None if bias is None else bias[None], tensors.get("e_score_correction_bias")
    )
    for found in (run(call), route_and_predict_reference(call)):
        order, theirs = found.topk_ids.long().argsort(1), ids.argsort(1)  # theirs is in no particular order
        assert torch.equal(found.topk_ids.long().gather(1, order), ids.gather(1, theirs))
        torch.testing.assert_close(found.topk_weights.gather(1, order), weights.gather(1, theirs), rtol=1e-5, atol=1e-6)


def test_a_routing_that_does_not_fit_is_refused() -> None:
    for options, complaint in (
        ({"top_k": 9}, "top_k = 9 must be between 1 and experts in the kept groups = 8"),
        ({"top_k": 5, "n_groups": 4, "n_kept_groups": 2}, "experts in the kept groups = 4"),
        ({"top_k": 1, "n_groups": 3}, "n_groups = 3 must divide the 8 experts"),
        ({"top_k": 1, "n_groups": 2, "n_kept_groups": 3}, "n_kept_groups = 3"),
        ({"top_k": 1, "n_groups": 8, "n_kept_groups": 2}, "groups of at least 2"),
        ({"top_k": 1, "score": "tanh"}, "'tanh' must be one of softmax, sigmoid"),
    ):
        with pytest.raises(KernelInputError, match=complaint):
            random_call(1, 8, 4, Routing(**options))


def test_tensors_that_do_not_fit_are_refused() -> None:
    good = random_call(5, 8, 4, Routing(2), n_heads=1, n_guesses=3)
    with pytest.raises(KernelInputError, match="n_guesses = 9 must be between 1 and experts = 8"):
        RouterCall(good.x, good.weights, good.routing, 9)
    with pytest.raises(KernelInputError, match="n_guesses = 3 but weights has no heads"):
        RouterCall(good.x, good.weights[:1], good.routing, 3)
    with pytest.raises(KernelInputError, match="weights is float16, expected float32"):
        RouterCall(good.x, good.weights.half(), good.routing, 3)
    with pytest.raises(KernelInputError, match="experts = 1025"):
        random_call(1, 1025, 1, Routing(1))
    with pytest.raises(KernelInputError, match="arrivals has 1 counts, this call needs 2"):
        route_and_predict(good, arrivals=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(KernelInputError, match=r"head_ids has shape \[1, 5, 4\], expected \[1, 5, 3\]"):
        route_and_predict(good, good.new_result()._replace(head_ids=torch.empty(1, 5, 4, dtype=torch.int32)))
