"""Copy expert rows from pinned host memory into slots, by the GPU's own loads and stores: what to copy is read on the device.

The grid is fixed and the number of copies is the plan's, so it can be captured in a CUDA graph and needs no host. Programs
take blocks of all rows in turn: a program's block is contiguous in both memories, in 16-byte words.

Bytes: row_bytes for each copy, over the link once. The copy engine moves them faster (52-55 against 35 GB/s reported for
Gen5 x16, nvbandwidth #24) and takes no multiprocessor: use this one where the host must not be asked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compile_case import CompileCase, Expectations
from kernels.device_cache import CachePlan
from kernels.launch import Launch, check_aligned, check_launchable, check_tensor
from prefetch.errors import KernelInputError
from prefetch.geometry import TENSOR_ALIGNMENT

WORDS_AT_ONCE = 4096  # int32: 16 KiB a program, 8 loads of 16 bytes a thread in flight
PARTS = {"demand": (0, 1), "prefetch": (1, 2), "all": (0, 2)}  # which of the plan's copy bounds


def gather_rows(pool: Tensor, row_of: Tensor, plan: CachePlan, part: str = "all", n_programs: int = 16) -> None:
    """Carry out the copies of `plan`.

    Args:
        pool: uint8 [S, row_bytes], the slots; rows any multiple of 128 bytes apart.
        row_of: int64 [L, E] on the pool's device: the byte address of every expert's row, `row_bytes` long, in pinned host
            memory (or on the device). 0 is skipped: the slot keeps what it holds.
        plan: from `cache_plan`.
        part: `demand` loads, `prefetch`es, or `all`.
        n_programs: fixed grid; more of them have more bytes in flight and leave fewer multiprocessors to others.

    Raises:
        KernelInputError: arguments that do not fit; nothing has been launched then.
    """
    launch = gather_launch(pool, row_of, plan, part, n_programs)
    check_launchable(pool.device)
    launch.run()


def gather_launch(pool: Tensor, row_of: Tensor, plan: CachePlan, part: str = "all", n_programs: int = 16) -> Launch:
    """The launch, checked and not yet run."""
    if part not in PARTS:
        raise KernelInputError(f"part={part!r} is unknown; choose {', '.join(PARTS)}")
    if n_programs < 1:
        raise KernelInputError(f"n_programs = {n_programs} must be at least 1")
    check_tensor("pool", pool, [None, None], [torch.uint8], pool.device, contiguous_dims=1)
    check_tensor("row_of", row_of, [None, None], [torch.int64], pool.device)
    check_tensor("plan.copy_keys", plan.copy_keys, [None], [torch.int32], pool.device)
    check_tensor("plan.copy_slots", plan.copy_slots, list(plan.copy_keys.shape), [torch.int32], pool.device)
    check_tensor("plan.copy_bounds", plan.copy_bounds, [3], [torch.int32], pool.device)
    check_aligned("pool", pool)
    if pool.shape[1] % TENSOR_ALIGNMENT or pool.stride(0) % TENSOR_ALIGNMENT:
        raise KernelInputError(
            f"pool has rows of {pool.shape[1]} bytes, {pool.stride(0)} apart: make both a multiple of {TENSOR_ALIGNMENT}"
        )
    first, last = PARTS[part]
    return Launch(
        _gather_kernel,
        (n_programs,),
        {
            "pool_ptr": pool.view(torch.int32),
            "row_of_ptr": row_of,
            "keys_ptr": plan.copy_keys,
            "slots_ptr": plan.copy_slots,
            "bounds_ptr": plan.copy_bounds,
            "row_stride": pool.stride(0) // 4,
            "n_slots": pool.shape[0],
            "n_keys": row_of.numel(),
            "first": first,
            "last": last,
            "ROW_WORDS": pool.shape[1] // 4,
            "WORDS": WORDS_AT_ONCE,
        },
    )


def compile_cases() -> list[CompileCase]:
    """For the ahead-of-time compiler: rows of Qwen3-30B-A3B in bf16, and of one with rows that are no multiple of a program's block."""
    cases = []
    for name, row_bytes in (("Qwen3-30B-A3B bf16", 9_437_184), ("odd rows", 9_437_184 + TENSOR_ALIGNMENT)):
        pool = torch.empty(64, row_bytes, dtype=torch.uint8, device="meta")
        row_of = torch.empty(48, 128, dtype=torch.int64, device="meta")
        plan = CachePlan.empty(torch.empty(1, 8, dtype=torch.int32, device="meta"), 16)
        cases.append(CompileCase(name, gather_launch(pool, row_of, plan), Expectations(wide_loads=True)))
    return cases


def gather_rows_reference(pool: Tensor, rows: dict[int, Tensor], plan: CachePlan, part: str = "all") -> None:
    """The same in PyTorch, with the rows themselves (uint8 [row_bytes], by expert key) for their addresses."""
    first, last = (int(plan.copy_bounds[bound]) for bound in PARTS[part])
    for copy in range(first, last):
        pool[int(plan.copy_slots[copy])] = rows[int(plan.copy_keys[copy])]


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    pool_ptr, row_of_ptr, keys_ptr, slots_ptr, bounds_ptr, row_stride, n_slots, n_keys, first, last,
    ROW_WORDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Blocks program, program + n_programs, ... of all rows to copy. Keys and slots out of range copy nothing."""
    blocks_per_row: tl.constexpr = (ROW_WORDS + WORDS - 1) // WORDS
    begin = tl.load(bounds_ptr + first) * blocks_per_row
    end = tl.load(bounds_ptr + last) * blocks_per_row
    for block in range(begin + tl.program_id(0), end, tl.num_programs(0)):
        key = tl.load(keys_ptr + block // blocks_per_row)
        slot = tl.load(slots_ptr + block // blocks_per_row)
        known = (key >= 0) & (key < n_keys) & (slot >= 0) & (slot < n_slots)
        address = tl.load(row_of_ptr + key, mask=known, other=0)
        word = block % blocks_per_row * WORDS + tl.arange(0, WORDS)
        inside = (word < ROW_WORDS) & (address != 0)
        source = tl.multiple_of(address.to(pool_ptr.dtype), 16)
        target = tl.multiple_of(pool_ptr + slot.to(tl.int64) * row_stride, 16)
        data = tl.load(source + word, mask=inside, eviction_policy="evict_first")
        tl.store(target + word, data, mask=inside)
