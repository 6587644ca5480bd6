"""The highest scores of a row, alone: what every router and predictor selects by."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernels.guesses import Guesses, guesses_reference, write_guesses


@triton.jit
def _guess(  # type: ignore[no-untyped-def]
    logits_ptr, guess_ids_ptr, guess_scores_ptr, n_experts, n_guesses, threshold,
    CHUNKS: tl.constexpr, COPIES: tl.constexpr, LANES: tl.constexpr, GUESSES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    write_guesses(
        token, logits_ptr, guess_ids_ptr, guess_scores_ptr, n_experts, n_guesses, threshold, CHUNKS, COPIES, LANES, GUESSES
    )


@pytest.mark.parametrize("num_warps", [1, 8])
@pytest.mark.parametrize("n_experts", [1, 5, 31, 128, 150, 512])
def test_ties_nan_and_padding(n_experts: int, num_warps: int) -> None:
    random = torch.Generator().manual_seed(n_experts)
    logits = torch.randn(3, n_experts, generator=random)
    logits[1] = logits[1].round()
    logits[2, torch.randint(n_experts, (n_experts // 2,), generator=random)] = torch.nan
    logits[2, ::3] = -torch.inf
    logits[1, ::4], logits[1, 1::4] = -0.0, 0.0
    n_guesses = min(8, n_experts)
    out = Guesses.empty(3, n_experts, n_guesses, torch.device("cpu"))._replace(logits=logits)
    out.ids.fill_(-9)
    out.scores.fill_(torch.nan)
    _guess[(3,)](**out.arguments(-torch.inf, num_warps), num_warps=num_warps)
    wanted = guesses_reference(logits, n_guesses, -torch.inf)
    assert out.ids.tolist() == wanted.ids.tolist()
    assert torch.equal(out.scores, wanted.scores)
