"""What a predictor's kernel hands out: the m likeliest experts of a coming layer, cut off at a threshold."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.integers import next_power_of_2
from kernels.launch import check_at_most, check_tensor
from kernels.selection import CHUNK_LANES, highest, highest_reference, selection_keys


class Guesses(NamedTuple):
    """For T tokens, E experts. Where fewer than m experts reach the threshold, the last ids are -1 and their scores -inf."""

    logits: Tensor  # float32 [T, E]
    ids: Tensor  # int32 [T, m], best first, ties to the lower id; NaN reaches no threshold
    scores: Tensor  # float32 [T, m]

    @classmethod
    def empty(cls, n_tokens: int, n_experts: int, n_guesses: int, device: torch.device) -> Guesses:
        """New memory."""
        check_at_most("n_guesses", n_guesses, "experts", n_experts)
        return cls(
            torch.empty(n_tokens, n_experts, device=device),
            torch.empty(n_tokens, n_guesses, dtype=torch.int32, device=device),
            torch.empty(n_tokens, n_guesses, device=device),
        )

    def check(self, n_tokens: int, n_experts: int, device: torch.device) -> None:
        """Raises:
        KernelInputError: this is no memory for the guesses of such a call.
        """
        check_tensor("logits", self.logits, [n_tokens, n_experts], [torch.float32], device)
        check_tensor("ids", self.ids, [n_tokens, None], [torch.int32], device)
        check_at_most("n_guesses", self.n_guesses, "experts", n_experts)
        check_tensor("scores", self.scores, list(self.ids.shape), [torch.float32], device)

    @property
    def n_guesses(self) -> int:
        return int(self.ids.shape[1])

    def arguments(self, threshold: float, num_warps: int) -> dict[str, Tensor | int | float | bool | None]:
        """What a kernel takes that calls `write_guesses`, in programs of `num_warps` warps."""
        n_experts = self.logits.shape[1]
        n_lanes = next_power_of_2(n_experts)
        return {
            "logits_ptr": self.logits,
            "guess_ids_ptr": self.ids,
            "guess_scores_ptr": self.scores,
            "n_experts": n_experts,
            "n_guesses": self.n_guesses,
            "threshold": float(threshold),
            "CHUNKS": max(1, n_lanes // CHUNK_LANES),
            "COPIES": num_warps,
            "LANES": min(n_lanes, CHUNK_LANES),
            "GUESSES": next_power_of_2(self.n_guesses),
        }


def guesses_reference(logits: Tensor, n_guesses: int, threshold: float) -> Guesses:
    """The choice in PyTorch, from logits [T, E] of any float dtype, which the scores keep."""
    ids = highest_reference(logits, n_guesses)
    scores = logits.gather(1, ids)
    reached = scores >= threshold
    return Guesses(logits, torch.where(reached, ids, -1).int(), torch.where(reached, scores, -torch.inf))


@triton.jit
def write_guesses(  # type: ignore[no-untyped-def]
    token,
    logits_ptr,
    guess_ids_ptr,
    guess_scores_ptr,
    n_experts,
    n_guesses,
    threshold,
    CHUNKS: tl.constexpr,
    COPIES: tl.constexpr,
    LANES: tl.constexpr,
    GUESSES: tl.constexpr,
):
    """Choose among the logits of one token (int64) that this program, or those it has seen arrive, have stored."""
    tl.debug_barrier()  # other threads of this program stored some of them
    logits_ptr += token * n_experts
    # A row for each warp, so that none waits for another; the first one's is stored.
    lane = tl.arange(0, CHUNKS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    lane = tl.broadcast_to(lane, [CHUNKS, COPIES, LANES])
    real = lane < n_experts
    ids = highest(selection_keys(tl.load(logits_ptr + lane, mask=real, other=0), real), lane, n_guesses, GUESSES)
    scores = tl.load(logits_ptr + ids, mask=ids >= 0, other=float("-inf"))
    reached = scores >= threshold
    rank = tl.broadcast_to(tl.arange(0, GUESSES)[None, :], [COPIES, GUESSES])
    at = token * n_guesses + rank
    stored = (rank < n_guesses) & (tl.arange(0, COPIES)[:, None] == 0)
    tl.store(guess_ids_ptr + at, tl.where(reached, ids, -1), mask=stored)
    tl.store(guess_scores_ptr + at, tl.where(reached, scores, float("-inf")), mask=stored)
