"""Moving experts to the GPU: copies from pinned memory by the copy engine, and kernels that read pinned memory in place."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.decode_mlp import decode_mlp
from kernels.device_cache import CachePlan
from kernels.gather_rows import gather_rows
from kernels.moe_call import MoECall
from kernels.slot_table import ExpertTable, addresses_of
from scripts.gpu.shapes import MoEShape

N_REPEATS = 20
MAX_PINNED_BYTES = 2 << 30
CHUNK_BYTES = 2 << 20


@dataclass(frozen=True)
class TransferRate:
    """One way to move, or to read in place, experts of one shape; bytes per second, median, over `n_experts` at a time."""

    shape: str
    way: str  # "copy engine, ..." | "copy by a kernel" | "read in place by decode_mlp"
    row_bytes: int
    n_experts: int
    bytes_per_s: float


def transfer_rates(shape: MoEShape, dtype: torch.dtype) -> Iterator[TransferRate]:
    """All ways, for as many experts as one token of the model needs and pinned memory allows."""
    geometry = shape.geometry(dtype)
    n_experts = max(1, min(shape.top_k, MAX_PINNED_BYTES // geometry.row_bytes))
    pinned = torch.zeros(n_experts, geometry.row_bytes, dtype=torch.uint8, pin_memory=True)
    slots = torch.empty_like(pinned, device="cuda")

    def copy() -> None:
        for expert in range(n_experts):  # one copy an expert
            slots[expert].copy_(pinned[expert], non_blocking=True)

    def copy_in_chunks() -> None:
        for expert in range(n_experts):
            for source, target in zip(pinned[expert].split(CHUNK_BYTES), slots[expert].split(CHUNK_BYTES), strict=True):
                target.copy_(source, non_blocking=True)

    copy_by_kernel, read_in_place = _by_kernels(shape, dtype, pinned, slots)
    for way, run in (
        ("copy engine, queued", copy),
        (f"copy engine, queued chunks of {CHUNK_BYTES >> 20} MiB", copy_in_chunks),
        ("copy by a kernel", copy_by_kernel),
        ("read in place by decode_mlp", read_in_place),
    ):
        yield TransferRate(shape.name, way, geometry.row_bytes, n_experts, pinned.numel() / _median_s(run))


def rehearse_transfer_rates(shape: MoEShape, dtype: torch.dtype) -> None:
    """Launch what `transfer_rates` launches, on tensors without memory."""
    rows = torch.empty(max(1, shape.top_k), shape.geometry(dtype).row_bytes, dtype=torch.uint8, device="meta")
    for run in _by_kernels(shape, dtype, rows, rows):
        run()


def _by_kernels(
    shape: MoEShape, dtype: torch.dtype, rows: Tensor, slots: Tensor
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Copy `rows` [n, row_bytes] to `slots`; read them in place for one token."""
    n_experts, device = len(rows), slots.device
    row_of = addresses_of(rows)[None].to(device)
    plan = CachePlan.empty(torch.empty(1, n_experts, dtype=torch.int32, device=device), 0)
    plan.copy_keys.copy_(torch.arange(n_experts))
    plan.copy_slots.copy_(torch.arange(n_experts))
    plan.copy_bounds.copy_(torch.tensor([0, n_experts, n_experts]))
    table = ExpertTable(shape.geometry(dtype), (rows,), row_of)
    x = torch.ones(1, shape.hidden, dtype=dtype, device=device)
    ids = torch.arange(n_experts, device=device)[None]
    call = MoECall(x, ids, torch.full((1, n_experts), 1 / n_experts, device=device), table, 0)

    def read_in_place() -> None:
        decode_mlp(call)

    return lambda: gather_rows(slots, row_of, plan), read_in_place


def _median_s(run: Callable[[], None]) -> float:
    run()
    times = []
    for _ in range(N_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
