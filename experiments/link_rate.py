"""What the backing tier can deliver: expert-sized reads, without queues, slots or policies."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from prefetch.geometry import ExpertKey, MoEGeometry
from prefetch.slots import SlotPool
from prefetch.transfers.sources import Source

N_READS = 256
MOST_BUFFERS, MOST_BUFFER_BYTES = 64, 1 << 30


def measured_bytes_per_s(
    source: Source, geometry: MoEGeometry, n_threads: int, device: torch.device | str = "cpu", n_reads: int = N_READS
) -> float:
    """Bytes per second of `n_reads` random expert rows, read by `n_threads` threads into memory like that of the slots on `device`."""
    row_bytes = geometry.expert.row_bytes
    n_buffers = min(MOST_BUFFERS, max(n_threads, MOST_BUFFER_BYTES // row_bytes))  # beside a model and its slots, for a moment
    pool = SlotPool(geometry, n_buffers, device)
    flat = np.random.default_rng(0).integers(geometry.n_total, size=n_reads)
    keys = [ExpertKey(*divmod(int(i), geometry.n_experts)) for i in flat]

    def read_share(thread: int) -> None:
        for i in range(thread, n_reads, n_threads):
            source.read_to(keys[i], 0, pool.address(i % n_buffers), row_bytes)

    with ThreadPoolExecutor(n_threads) as threads:
        list(threads.map(read_share, range(n_threads)))  # once to warm up: first touch of the buffers
        started = time.perf_counter()
        list(threads.map(read_share, range(n_threads)))
    return n_reads * row_bytes / (time.perf_counter() - started)
