"""The highest scores of a row inside a kernel, and which of many programs finishes last: what routers and predictors share.

A score becomes an int32 of the same order, so that the highest of a warp's and the lowest id that has it are an instruction each
(REDUX). A row's lanes are [CHUNKS, ROWS, LANES], of which the compiler gives chunks to registers, rows to warps and up to 128 lanes to
one warp: nobody waits for another warp. NaN counts as -inf, so whatever a row holds, its ids are distinct and in range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import check_tensor
from prefetch.errors import KernelInputError

TAKEN = tl.constexpr(-(2**31))  # below the key of every score, -inf too
NO_ID = tl.constexpr(2**31 - 1)  # above every id; all bits but the sign
CHUNK_LANES = 128  # 4 a thread of a warp: what one vector load brings


def check_arrivals(arrivals: Tensor, n_counts: int, device: torch.device) -> None:
    """Refuse arrival counts (int32 zeros, kept at zero by the kernels) that are fewer than `n_counts`.

    They belong to one stream: launches in order may share them, launches that can overlap may not (two streams, two graphs replayed
    at once), since each would count the other's programs. A launch that the driver aborts may leave them above zero, but then the
    context is lost with all its memory.
    """
    check_tensor("arrivals", arrivals, [None], [torch.int32], device)
    if len(arrivals) < n_counts:
        raise KernelInputError(f"arrivals has {len(arrivals)} counts, this call needs {n_counts}")


def highest_reference(scores: Tensor, n: int) -> Tensor:
    """Ids int64 [..., n] of the `n` highest of `scores` [..., E]; of equal scores the lower id first, NaN like -inf."""
    ordered = torch.where(scores.isnan(), -torch.inf, scores)
    return torch.sort(ordered, dim=-1, descending=True, stable=True).indices[..., :n]


@triton.jit
def selection_keys(scores, real):  # type: ignore[no-untyped-def]
    """int32 keys of fp32 `scores`; `real` (False = a padding lane, never selected) broadcasts against them."""
    ordered = tl.where(scores != scores, float("-inf"), scores)
    bits = tl.where(ordered == 0, 0.0, ordered).to(tl.int32, bitcast=True)  # -0 ties with 0
    return tl.where(real, bits ^ ((bits >> 31) & NO_ID), TAKEN)  # as integers, negative floats fall as they rise


@triton.jit
def highest(keys, ids, n, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ids int32 [ROWS, WIDTH]: the `n` highest of `keys` [CHUNKS, ROWS, LANES] in each row, best first, then -1.

    `ids` broadcasts against `keys` and tells a row's lanes apart. At least `n` lanes are real.
    """
    rank = tl.arange(0, WIDTH)[None, :]
    found = tl.full([keys.shape[1], WIDTH], -1, tl.int32)
    for taken in range(n):
        best = tl.max(tl.max(keys, axis=0), axis=1)
        first = tl.where(keys == best[None, :, None], ids, NO_ID)
        first = tl.min(tl.min(first, axis=0), axis=1)
        found = tl.where(rank == taken, first[:, None], found)
        keys = tl.where(ids == first[None, :, None], TAKEN, keys)
    return found


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
