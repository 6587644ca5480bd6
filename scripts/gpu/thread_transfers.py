"""The runtime's own way to move experts: worker threads that feed the copy engine, each waiting for its chunk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch

from prefetch.geometry import ExpertGeometry, ExpertKey, MoEGeometry
from prefetch.memory import allocate_pages
from prefetch.slots import SlotPool
from prefetch.transfers.cuda_driver import CudaDriver
from prefetch.transfers.pinned import PinnedSource
from prefetch.transfers.threads import ThreadTransfers
from scripts.gpu.shapes import MoEShape
from scripts.gpu.transfers import TransferRate

MIB = 1 << 20
CHUNKS_MIB, THREADS = (1, 2, 4, 8), (2, 3)
N_ROWS = 64  # in flight at once
N_REPEATS = 3  # the fastest counts: the link is what is asked for


class ZeroRows(PinnedSource):
    """`N_ROWS` rows of zeros: the link does not look into them."""

    def __init__(self, expert: ExpertGeometry, driver: CudaDriver, n_threads: int):
        self._n_bytes = N_ROWS * expert.row_bytes
        super().__init__("rows", lambda key: key.expert * expert.row_bytes, expert.row_bytes, driver, n_threads)

    def load(self) -> np.ndarray:
        rows = np.frombuffer(allocate_pages(self._n_bytes, "rows to copy"), dtype=np.uint8)
        rows[:] = 0  # in memory, and not all of them the one page of zeros
        return rows


def thread_transfer_rates(
    shape: MoEShape, dtype: torch.dtype, device: torch.device, driver: CudaDriver
) -> Iterator[TransferRate]:
    """Every chunk size and number of threads."""
    geometry = MoEGeometry(1, N_ROWS, 1, shape.geometry(dtype))
    pool = SlotPool(geometry, N_ROWS, device)
    n_bytes = N_ROWS * geometry.expert.row_bytes
    for n_threads in THREADS:
        with closing(ZeroRows(geometry.expert, driver, n_threads)) as source:
            for chunk_mib in CHUNKS_MIB:
                transfers = ThreadTransfers(
                    source, pool.buffer, n_threads=n_threads, chunk_bytes=chunk_mib * MIB, slot_address=pool.address
                )
                with closing(transfers):
                    seconds = min(_moved_s(transfers) for _ in range(N_REPEATS))
                way = f"copy engine, {n_threads} threads, chunks of {chunk_mib} MiB"
                yield TransferRate(shape.name, way, geometry.expert.row_bytes, N_ROWS, n_bytes / seconds)


def _moved_s(transfers: ThreadTransfers) -> float:
    """Seconds until all rows have arrived."""
    began_s = time.perf_counter()
    waiting = [transfers.submit(ExpertKey(0, row), row, demand=True) for row in range(N_ROWS)]
    while waiting:
        arrived = transfers.wait_any(waiting)
        for transfer in arrived:
            if transfer.error is not None:
                raise transfer.error
        waiting = [transfer for transfer in waiting if not transfer.settled]
    return time.perf_counter() - began_s
