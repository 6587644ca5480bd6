"""A router and the predictor heads that read the same hidden state, in one launch.

`kernels.router_call` has the equations. One program per block of expert rows, head and block of tokens. The last to finish of those that share head and tokens selects:
a second launch would cost more than all of the arithmetic. Up to 4 tokens are vectors on the CUDA cores, more are blocks
of 16 on tensor cores. Logits are summed and kept in fp32: a model that rounds its own to bf16 may order near-ties otherwise.

Bytes: (1 + d) * E * H weights once per 16 tokens (per token up to 4). FLOPs: 2 * T * (1 + d) * E * H.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compile_case import SHORT_NAMES, CompileCase, Expectations
from kernels.integers import cdiv, next_power_of_2
from kernels.launch import Launch, check_launchable
from kernels.router_call import BLOCK_TOKENS, Routed, RouterCall
from kernels.routing import SMALLEST_SUM, Routing
from kernels.selection import CHUNK_LANES, NO_ID, TAKEN, highest, last_to_arrive, selection_keys

VECTOR_BYTES = 4096  # of a row of weights at once: 8 loads of 16 bytes a thread in flight
BLOCK_COLUMNS = {2: 512, 4: 128}  # of a tile of weights, by the bytes of one


def route_and_predict(call: RouterCall, out: Routed | None = None, arrivals: Tensor | None = None) -> Routed:
    """Route T tokens and guess for d coming layers, in one launch.

    Args:
        call: what to compute.
        out: where to write it; by default new memory.
        arrivals: int32 zeros, at least (1 + d) * `call.n_blocks` of them. The kernel leaves zeros: give every call of a stream the
            same ones and no launch is spent on clearing them. By default new ones.

    Returns:
        `out`. Ids are distinct and in range whatever the input; equal scores go to the lower id; NaN counts as -inf for the
        choice, and a NaN logit makes its row's softmax weights NaN.

    Raises:
        KernelInputError: `out` or `arrivals` do not fit, or this machine cannot run the kernel; nothing has been launched then.
    """
    out = call.new_result() if out is None else out
    if arrivals is None:
        arrivals = torch.zeros((1 + call.n_heads) * call.n_blocks, dtype=torch.int32, device=call.x.device)
    launch = route_launch(call, out, arrivals)
    check_launchable(call.x.device)
    launch.run()
    return out


def route_launch(call: RouterCall, out: Routed, arrivals: Tensor) -> Launch:
    """The launch, checked and not yet run."""
    call.check_outputs(out, arrivals)
    routing, hidden = call.routing, call.x.shape[1]
    vector = call.block_tokens == 1
    rows = 1 if vector else BLOCK_TOKENS
    n_groups = routing.n_groups if routing.grouped else 1
    most = VECTOR_BYTES // call.x.element_size() if vector else BLOCK_COLUMNS[call.x.element_size()]
    if n_groups > 1 and not vector:
        most //= 2  # with tiles of 512 columns beside the selection by groups, registers spill on sm_100
    columns = min(max(next_power_of_2(hidden), 16), most)
    group_size = call.n_experts // n_groups
    members = next_power_of_2(group_size)
    n_lanes = next_power_of_2(n_groups) * members
    lanes = min(n_lanes, max(CHUNK_LANES, members if n_groups > 1 else 1))
    return Launch(
        _route_kernel,
        (cdiv(call.n_experts, rows), 1 + call.n_heads, call.n_blocks),
        {
            "x_ptr": call.x,
            "weights_ptr": call.weights,
            "bias_ptr": call.bias,
            "selection_bias_ptr": call.selection_bias,
            "arrivals_ptr": arrivals,
            "logits_ptr": out.logits,
            "topk_ids_ptr": out.topk_ids,
            "topk_weights_ptr": out.topk_weights,
            "head_ids_ptr": out.head_ids if call.n_heads else None,
            "head_scores_ptr": out.head_scores if call.n_heads else None,
            "n_tokens": call.n_tokens,
            "n_experts": call.n_experts,
            "top_k": routing.top_k,
            "n_guesses": call.n_guesses,
            "scaling_factor": float(routing.scaling_factor),
            "n_kept_groups": routing.n_kept_groups,
            "HIDDEN": hidden,
            "SOFTMAX": routing.score == "softmax",
            "BY_LOGIT": routing.chooses_by_logit(call.selection_bias is not None),
            "RENORMALISE": routing.renormalise,
            "SMALLEST_SUM": SMALLEST_SUM,
            "N_GROUPS": n_groups,
            "TWO_BEST": routing.group_score == "two_best",
            "GROUP_SIZE": group_size if n_groups > 1 else members,  # one group needs no gaps between groups
            "MEMBERS": members,
            "CHUNKS": n_lanes // lanes,
            "LANES": lanes,
            "RANKS": next_power_of_2(routing.top_k),
            "GUESSES": next_power_of_2(max(call.n_guesses, 1)),
            "TOKENS": call.block_tokens,
            "ROWS": rows,
            "COLUMNS": columns // 2 if vector and hidden % columns and hidden % (columns // 2) == 0 else columns,
        },
        num_warps=1 if vector else 8 if n_lanes > 128 else 4,  # a vector's program is one warp, which waits for no other
        num_stages=1 if vector else 3,
    )


def compile_cases() -> list[CompileCase]:
    """For the ahead-of-time compiler: with 4 heads, as vectors and on tensor cores."""
    deepseek = Routing(8, "sigmoid", renormalise=True, scaling_factor=2.5, n_groups=8, n_kept_groups=4)
    cases = []
    for model, hidden, n_experts, routing, dtype in (
        ("Qwen3-30B-A3B", 2048, 128, Routing(8, renormalise=True), torch.bfloat16),
        ("Qwen3-30B-A3B", 2048, 128, Routing(8, renormalise=True), torch.float32),
        ("Qwen3.6-35B-A3B", 2048, 256, Routing(8, renormalise=True), torch.bfloat16),
        ("gpt-oss-20b", 2880, 32, Routing(4, renormalise=True), torch.bfloat16),
        ("DeepSeek-V3", 7168, 256, deepseek, torch.bfloat16),
    ):
        for n_tokens in (1, 16):
            call = _meta_call(n_tokens, hidden, n_experts, routing, dtype)
            arrivals = torch.empty((1 + call.n_heads) * call.n_blocks, dtype=torch.int32, device="meta")
            exact = dtype == torch.float32
            expect = Expectations(max_registers=208, wide_loads=True, tensor_cores=n_tokens > 1 and not exact)
            name = f"{model} T={n_tokens} {SHORT_NAMES[dtype]}"
            cases.append(CompileCase(name, route_launch(call, call.new_result(), arrivals), expect))
    return cases


def _meta_call(n_tokens: int, hidden: int, n_experts: int, routing: Routing, dtype: torch.dtype) -> RouterCall:
    x = torch.empty(n_tokens, hidden, dtype=dtype, device="meta")
    bias = torch.empty(n_experts, device="meta") if routing.grouped else None
    return RouterCall(x, x.new_empty(5, n_experts, hidden), routing, 2 * routing.top_k, selection_bias=bias)


@triton.jit
def _route_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weights_ptr, bias_ptr, selection_bias_ptr, arrivals_ptr,
    logits_ptr, topk_ids_ptr, topk_weights_ptr, head_ids_ptr, head_scores_ptr,
    n_tokens, n_experts, top_k, n_guesses, scaling_factor, n_kept_groups,
    HIDDEN: tl.constexpr, SOFTMAX: tl.constexpr, BY_LOGIT: tl.constexpr, RENORMALISE: tl.constexpr, SMALLEST_SUM: tl.constexpr,
    N_GROUPS: tl.constexpr, TWO_BEST: tl.constexpr, GROUP_SIZE: tl.constexpr, MEMBERS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr,
    RANKS: tl.constexpr, GUESSES: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Logits of ROWS experts of one head for TOKENS tokens; in the last such program of head and tokens, the selection."""
    head = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token_inside, expert_inside = token < n_tokens, expert < n_experts
    logits = _row_logits(
        x_ptr, weights_ptr + head.to(tl.int64) * n_experts * HIDDEN, token, expert, token_inside, expert_inside,
        HIDDEN, TOKENS, ROWS, COLUMNS,
    )  # fmt: skip
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + head * n_experts + expert, mask=expert_inside, other=0)[None, :]
    logits_ptr += head.to(tl.int64) * n_tokens * n_experts
    token_logits = logits_ptr + token.to(tl.int64)[:, None] * n_experts
    tl.store(token_logits + expert[None, :], logits, mask=token_inside[:, None] & expert_inside[None, :])
    if not last_to_arrive(arrivals_ptr + head * tl.num_programs(2) + tl.program_id(2), tl.num_programs(0)):
        return

    lane = tl.arange(0, CHUNKS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    lane_expert = lane
    real = lane < n_experts
    if GROUP_SIZE < MEMBERS:
        lane_expert = lane // MEMBERS * GROUP_SIZE + lane % MEMBERS
        real = (lane // MEMBERS < N_GROUPS) & (lane % MEMBERS < GROUP_SIZE)
    lane_logits = token_logits[None, :, :] + lane_expert
    logits = tl.load(lane_logits, mask=token_inside[None, :, None] & real, other=0)
    logits = tl.where(real, logits, float("-inf"))
    if head == 0:
        best = tl.max(tl.max(logits, axis=0), axis=1)[:, None]
        total = tl.sum(tl.sum(tl.exp(logits - best[None, :, :]), axis=0), axis=1)[:, None]
        choice = logits
        if not BY_LOGIT:
            choice = _scores(logits, best[None, :, :], total[None, :, :], SOFTMAX)
        if selection_bias_ptr is not None:
            choice += tl.load(selection_bias_ptr + lane_expert, mask=real, other=0)
        if N_GROUPS > 1:
            kept = _best_groups(choice, real, n_kept_groups, N_GROUPS, MEMBERS, TWO_BEST)
            choice = tl.where((kept[None, :, None] >> (lane // MEMBERS)) & 1 == 1, choice, float("-inf"))
        ids = highest(selection_keys(choice, real), lane_expert, top_k, RANKS)
        inside = token_inside[:, None] & (ids >= 0)
        chosen = tl.load(token_logits + ids, mask=inside, other=float("-inf"))
        weights = tl.where(inside, _scores(chosen, best, total, SOFTMAX), 0.0)
        if RENORMALISE:
            weights /= tl.sum(weights, axis=1, keep_dims=True) + SMALLEST_SUM
        out = token.to(tl.int64)[:, None] * top_k + tl.arange(0, RANKS)[None, :]
        tl.store(topk_ids_ptr + out, ids, mask=inside)
        tl.store(topk_weights_ptr + out, weights * scaling_factor, mask=inside)
    elif head_ids_ptr is not None:
        guesses = highest(selection_keys(logits, real), lane_expert, n_guesses, GUESSES)
        guessed = token_inside[:, None] & (guesses >= 0)
        at = ((head - 1).to(tl.int64) * n_tokens + token[:, None]) * n_guesses + tl.arange(0, GUESSES)[None, :]
        tl.store(head_ids_ptr + at, guesses, mask=guessed)
        tl.store(head_scores_ptr + at, tl.load(token_logits + guesses, mask=guessed, other=0), mask=guessed)


@triton.jit
def _row_logits(  # type: ignore[no-untyped-def]
    x_ptr, weights_ptr, token, row, token_inside, row_inside,
    HIDDEN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x[tokens] @ weights[rows].T in fp32, [TOKENS, ROWS]."""
    column = tl.arange(0, COLUMNS)
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    if TOKENS == 1:
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        weight_ptrs = weights_ptr + row[:, None] * HIDDEN + column[None, :]
        for first in range(0, HIDDEN, COLUMNS):
            inside = (first + column < HIDDEN) | (HIDDEN % COLUMNS == 0)
            x = tl.load(x_ptrs + first, mask=inside[None, :], other=0).to(tl.float32)
            products += tl.load(weight_ptrs + first, mask=row_inside[:, None] & inside[None, :], other=0).to(tl.float32) * x
        return tl.sum(products, axis=1)[None, :]
    else:
        logits = tl.zeros([TOKENS, ROWS], tl.float32)
        weight_ptrs = weights_ptr + row[None, :] * HIDDEN + column[:, None]
        for first in range(0, HIDDEN, COLUMNS):
            inside = first + column < HIDDEN
            x = tl.load(x_ptrs + first, mask=token_inside[:, None] & inside[None, :], other=0)
            weights = tl.load(weight_ptrs + first, mask=inside[:, None] & row_inside[None, :], other=0)
            logits = tl.dot(x, weights, logits, input_precision="ieee")
        return logits


@triton.jit
def _scores(logits, best, total, SOFTMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """The router's scores of some logits, given the highest logit and the sum of exponentials of their whole rows."""
    if SOFTMAX:
        return tl.exp(logits - best) / total
    else:
        return tl.sigmoid(logits)


@triton.jit
def _best_groups(  # type: ignore[no-untyped-def]
    choice, real, n_kept, N_GROUPS: tl.constexpr, MEMBERS: tl.constexpr, TWO_BEST: tl.constexpr
):
    """int32 [TOKENS]: a bit for each of the `n_kept` best groups of MEMBERS lanes of `choice` [CHUNKS, TOKENS, LANES].

    Bits, so that `choice` itself keeps its layout, in which a row's selection stays within a warp.
    """
    IN_CHUNK: tl.constexpr = choice.shape[2] // MEMBERS
    groups = tl.where(real & (choice == choice), choice, float("-inf"))
    groups = tl.reshape(groups, [choice.shape[0], choice.shape[1], IN_CHUNK, MEMBERS])
    score = tl.max(groups, axis=3)
    if TWO_BEST:
        member = tl.arange(0, MEMBERS)[None, None, None, :]
        best_member = tl.min(tl.where(groups == score[:, :, :, None], member, NO_ID), axis=3)
        score += tl.max(tl.where(member == best_member[:, :, :, None], float("-inf"), groups), axis=3)
    group = tl.arange(0, choice.shape[0])[:, None, None] * IN_CHUNK + tl.arange(0, IN_CHUNK)[None, None, :]
    keys = selection_keys(score, group < N_GROUPS)
    kept = tl.zeros([choice.shape[1]], tl.int32)
    for _ in range(n_kept):
        best = tl.max(tl.max(keys, axis=0), axis=1)
        first = tl.where(keys == best[None, :, None], group, NO_ID)
        first = tl.min(tl.min(first, axis=0), axis=1)
        kept |= 1 << first
        keys = tl.where(group == first[None, :, None], TAKEN, keys)
    return kept
