"""The highest scores of a row inside a kernel, and which of many programs finishes last: what routers and predictors share.

A score and its expert id are packed into one int64 whose order is the selection's order: higher score first, of equal scores the
lower id. One `tl.max` then finds both. NaN counts as -inf, so whatever a row holds, its ids are distinct and in range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import check_tensor
from prefetch.errors import KernelInputError

TAKEN = tl.constexpr(-(2**63))  # below the key of every score, -inf too
ID_BITS = tl.constexpr(2**31 - 1)


def check_arrivals(arrivals: Tensor, n_counts: int, device: torch.device) -> None:
    """Refuse arrival counts (int32 zeros, kept at zero by the kernels) that are fewer than `n_counts`."""
    check_tensor("arrivals", arrivals, [None], [torch.int32], device)
    if len(arrivals) < n_counts:
        raise KernelInputError(f"arrivals has {len(arrivals)} counts, this call needs {n_counts}")


def highest_reference(scores: Tensor, n: int) -> Tensor:
    """Ids int64 [..., n] of the `n` highest of `scores` [..., E]; of equal scores the lower id first, NaN like -inf."""
    ordered = torch.where(scores.isnan(), -torch.inf, scores)
    return torch.sort(ordered, dim=-1, descending=True, stable=True).indices[..., :n]


@triton.jit
def selection_keys(scores, ids, real):  # type: ignore[no-untyped-def]
    """int64 keys of fp32 `scores`; `ids` int32 >= 0 and `real` (False = a padding lane, never selected) broadcast against them."""
    ordered = tl.where(scores != scores, float("-inf"), scores)
    bits = tl.where(ordered == 0, 0.0, ordered).to(tl.int32, bitcast=True)  # -0 ties with 0
    rising = bits ^ ((bits >> 31) & ID_BITS)  # as integers, negative floats fall as they rise
    return tl.where(real, (rising.to(tl.int64) << 32) | (ids ^ ID_BITS), TAKEN)


@triton.jit
def highest(keys, n, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ids int32 [TOKENS, WIDTH]: the `n` highest of `keys` [TOKENS, LANES], best first, then -1. At least `n` lanes are real."""
    rank = tl.arange(0, WIDTH)[None, :]
    ids = tl.full([keys.shape[0], WIDTH], -1, tl.int32)
    for taken in range(n):
        best = tl.max(keys, axis=1, keep_dims=True)
        ids = tl.where(rank == taken, ((best & ID_BITS) ^ ID_BITS).to(tl.int32), ids)
        keys = tl.where(keys == best, TAKEN, keys)
    return ids


@triton.jit
def last_to_arrive(arrivals_ptr, n_programs):  # type: ignore[no-untyped-def]
    """True in the last of `n_programs` programs that call this, which then sees what all of them have stored before.

    The count is zero before a launch and is left at zero.
    """
    tl.debug_barrier()  # the stores of all threads come before the one thread's release
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == n_programs - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last
