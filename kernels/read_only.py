"""The roof of every expert kernel: read the same expert rows and fold their words into one, nothing else.

One program per chunk of a row and row; 16-byte loads, each byte once. Bytes: n_rows * row_bytes. A kernel that computes with these
bytes cannot be faster than this one, so its time is the denominator of "% of roof".
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compile_case import CompileCase, Expectations
from kernels.launch import Launch, check_aligned, check_launchable, check_tensor

CHUNK_WORDS = 8192  # 32 KB: 8 loads of 16 bytes for each of 256 threads


def read_rows(pool: Tensor, slots: Tensor) -> Tensor:
    """Exclusive or of the 32-bit words of each chunk of each row.

    Args:
        pool: uint8 [n_slots, row_bytes], row_bytes a multiple of 4.
        slots: int32 [n_rows], which rows.

    Returns:
        int32 [n_rows, n_chunks].

    Raises:
        KernelInputError: the arguments do not fit, or this machine cannot run the kernel.
    """
    launch, folded = read_launch(pool, slots)
    check_launchable(pool.device)
    launch.run()
    return folded


def read_launch(pool: Tensor, slots: Tensor) -> tuple[Launch, Tensor]:
    """The launch, checked and not yet run, and the memory for its result."""
    check_tensor("pool", pool, [None, None], [torch.uint8], pool.device)
    check_tensor("slots", slots, [None], [torch.int32], pool.device)
    check_aligned("pool", pool)
    words = pool.view(torch.int32)
    n_chunks = triton.cdiv(words.shape[1], CHUNK_WORDS)
    folded = torch.empty(len(slots), n_chunks, dtype=torch.int32, device=pool.device)
    arguments: dict[str, Tensor | int | float | bool | None] = {
        "words_ptr": words,
        "slots_ptr": slots,
        "folded_ptr": folded,
        "row_words": words.shape[1],
        "CHUNK": CHUNK_WORDS,
    }
    return Launch(_read_kernel, (n_chunks, len(slots)), arguments, num_warps=8), folded


def compile_cases() -> list[CompileCase]:
    """For the ahead-of-time compiler: the rows of one token of Qwen3-30B-A3B in bf16."""
    pool = torch.empty(128, 9_437_184, dtype=torch.uint8, device="meta")
    launch, _ = read_launch(pool, torch.empty(8, dtype=torch.int32, device="meta"))
    return [CompileCase("Qwen3-30B-A3B T=1 bf16", launch, Expectations(wide_loads=True, kilobytes_in_flight=16))]


def read_rows_reference(pool: Tensor, slots: Tensor) -> Tensor:
    """The same in NumPy, which has the operation."""
    rows = pool.view(torch.int32)[slots.long()].cpu().numpy()
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % CHUNK_WORDS)))
    return torch.from_numpy(np.bitwise_xor.reduce(padded.reshape(len(rows), -1, CHUNK_WORDS), axis=-1))


@triton.jit
def _read_kernel(words_ptr, slots_ptr, folded_ptr, row_words, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One chunk of one row."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    words = tl.load(words_ptr + slot * row_words + at, mask=at < row_words, other=0, eviction_policy="evict_first")
    tl.store(folded_ptr + row * tl.num_programs(0) + chunk, tl.xor_sum(words, axis=0))
