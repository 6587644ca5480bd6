"""What a router with predictor heads computes: its arguments, their checks, its results, and the PyTorch reference.

logits[h] = x @ weights[h].T (+ bias[h])        h = 0 the router, h = 1..d later layers' routers or linear pre-gate heads
router:  top-k ids and weights, by `kernels.routing`;    heads: the m highest logits and their ids
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.integers import cdiv
from kernels.launch import FLOAT_DTYPES, check_aligned, check_at_most, check_tensor
from kernels.routing import Routing, route_reference
from kernels.selection import check_arrivals, highest_reference
from prefetch.errors import KernelInputError

MAX_EXPERTS = 1024  # of which a thread of 8 warps holds 64 lanes of 16 tokens
MAX_GROUPS = 32  # of which an int32 has a bit each
VECTOR_TOKENS = 4  # up to here, reading the weights once a token from the L2 cache beats padding to 16
BLOCK_TOKENS = 16  # the smallest matrix instruction's
MAX_BLOCKS = 65_535  # CUDA's limit on a grid's third axis


class Routed(NamedTuple):
    """What the launch writes: T tokens, E experts, k of them, d heads with m guesses."""

    logits: Tensor  # float32 [1 + d, T, E]
    topk_ids: Tensor  # int32 [T, k], best first
    topk_weights: Tensor  # float32 [T, k]
    head_ids: Tensor  # int32 [d, T, m], best first
    head_scores: Tensor  # float32 [d, T, m], logits


@dataclass(frozen=True)
class RouterCall:
    """Arguments of one layer call.

    Args:
        x: [T, H], the router's input.
        weights: [1 + d, E, H], like `x`; the router's first.
        routing: the router's rule; heads have none.
        n_guesses: m; 0 exactly where there are no heads.
        bias: [1 + d, E] fp32, added to the logits.
        selection_bias: [E] fp32, added to the router's scores for its choice alone (DeepSeek-V3's e_score_correction_bias).

    Raises:
        KernelInputError: what the kernel could not read rightly.
    """

    x: Tensor
    weights: Tensor
    routing: Routing
    n_guesses: int = 0
    bias: Tensor | None = None
    selection_bias: Tensor | None = None

    def __post_init__(self) -> None:
        device = self.x.device
        check_tensor("x", self.x, [None, None], FLOAT_DTYPES, device)
        check_tensor("weights", self.weights, [None, None, self.x.shape[1]], [self.x.dtype], device)
        if self.bias is not None:
            check_tensor("bias", self.bias, [1 + self.n_heads, self.n_experts], [torch.float32], device)
        if self.selection_bias is not None:
            check_tensor("selection_bias", self.selection_bias, [self.n_experts], [torch.float32], device)
        check_at_most("experts", self.n_experts, "the kernel's limit", MAX_EXPERTS)
        self.routing.check(self.n_experts)
        check_at_most("Routing.n_groups", self.routing.n_groups, "the kernel's limit", MAX_GROUPS)
        if self.n_heads:
            check_at_most("n_guesses", self.n_guesses, "experts", self.n_experts)
        elif self.n_guesses:
            raise KernelInputError(f"n_guesses = {self.n_guesses} but weights has no heads: stack them behind the router's")
        if self.n_blocks > MAX_BLOCKS:
            raise KernelInputError(f"{self.n_tokens} tokens: one launch takes at most {MAX_BLOCKS * BLOCK_TOKENS}")
        check_aligned("x", self.x)
        check_aligned("weights", self.weights)

    @property
    def n_tokens(self) -> int:
        return int(self.x.shape[0])

    @property
    def n_heads(self) -> int:
        return int(self.weights.shape[0]) - 1

    @property
    def n_experts(self) -> int:
        return int(self.weights.shape[1])

    @property
    def block_tokens(self) -> int:
        """Tokens of one program."""
        return 1 if self.n_tokens <= VECTOR_TOKENS else BLOCK_TOKENS

    @property
    def n_blocks(self) -> int:
        """Blocks of tokens."""
        return cdiv(self.n_tokens, self.block_tokens)

    def new_result(self) -> Routed:
        """Memory for the result."""
        guesses = (self.n_heads, self.n_tokens, self.n_guesses)
        chosen = (self.n_tokens, self.routing.top_k)
        device = self.x.device
        return Routed(
            logits=torch.empty(1 + self.n_heads, self.n_tokens, self.n_experts, device=device),
            topk_ids=torch.empty(chosen, dtype=torch.int32, device=device),
            topk_weights=torch.empty(chosen, device=device),
            head_ids=torch.empty(guesses, dtype=torch.int32, device=device),
            head_scores=torch.empty(guesses, device=device),
        )

    def check_outputs(self, out: Routed, arrivals: Tensor) -> None:
        """`out` is like `new_result()`; `arrivals` has a count for each head and block of tokens, or more."""
        for name, shape, dtype in (
            ("logits", [1 + self.n_heads, self.n_tokens, self.n_experts], torch.float32),
            ("topk_ids", [self.n_tokens, self.routing.top_k], torch.int32),
            ("topk_weights", [self.n_tokens, self.routing.top_k], torch.float32),
            ("head_ids", [self.n_heads, self.n_tokens, self.n_guesses], torch.int32),
            ("head_scores", [self.n_heads, self.n_tokens, self.n_guesses], torch.float32),
        )[: 5 if self.n_heads else 3]:
            check_tensor(name, getattr(out, name), shape, [dtype], self.x.device)
        check_arrivals(arrivals, (1 + self.n_heads) * self.n_blocks, self.x.device)


def route_and_predict_reference(call: RouterCall, dtype: torch.dtype = torch.float32) -> Routed:
    """The same in PyTorch, all arithmetic and float results in `dtype`."""
    logits = torch.einsum("th,neh->nte", call.x.to(dtype), call.weights.to(dtype))
    if call.bias is not None:
        logits += call.bias.to(dtype)[:, None]
    topk_ids, topk_weights = route_reference(logits[0], call.routing, call.selection_bias)
    head_ids = highest_reference(logits[1:], call.n_guesses)
    return Routed(logits, topk_ids.int(), topk_weights, head_ids.int(), logits[1:].gather(2, head_ids))
