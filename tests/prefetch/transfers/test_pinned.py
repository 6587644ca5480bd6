"""Copies from pinned memory to a GPU: the real worker threads and bindings over a stand-in for the driver."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prefetch.errors import CapacityError, ConfigError, TransferError
from prefetch.geometry import PAGE_BYTES, ExpertKey
from prefetch.memory import allocate_pages
from prefetch.transfers.base import TransferState
from prefetch.transfers.cuda_driver import CudaDriver
from prefetch.transfers.native import address_of
from prefetch.transfers.pinned import PinnedSource, SlotFences
from prefetch.transfers.threads import ThreadTransfers
from tests.prefetch.transfers.gated_source import row_of
from tests.prefetch.transfers.stand_in_driver import COMPUTE_STREAM, StandInDriver

CHUNK, ROW_BYTES, N_EXPERTS, N_SLOTS, N_THREADS = PAGE_BYTES, 3 * PAGE_BYTES, 12, 6, 2
KEYS = [ExpertKey(0, expert) for expert in range(N_EXPERTS)]


class Gpu:
    """Slots in "device" memory, fences and transfers over the stand-in driver."""

    def __init__(self, folder: Path):
        self.path = folder / "experts.pack"
        self.path.write_bytes(b"".join(row_of(key, ROW_BYTES) for key in KEYS))
        libraries = folder / "libraries"
        libraries.mkdir()
        self.driver = StandInDriver(libraries)
        self.source = PinnedSource(self.path, lambda key: key[1] * ROW_BYTES, ROW_BYTES, self.driver, N_THREADS)
        self.fences = SlotFences(self.driver, N_SLOTS, lambda: COMPUTE_STREAM)
        self.memory = memoryview(allocate_pages(N_SLOTS * ROW_BYTES, "a test"))
        start = address_of(self.memory)
        self.transfers = ThreadTransfers(
            self.source,
            self.slot,
            n_threads=N_THREADS,
            chunk_bytes=CHUNK,
            slot_address=lambda slot: start + slot * ROW_BYTES,
            fence=self.fences.event,
        )

    def slot(self, slot: int) -> memoryview:
        return self.memory[slot * ROW_BYTES : (slot + 1) * ROW_BYTES]

    def close(self) -> None:
        self.driver.keep_computing(False)
        self.transfers.close()
        self.fences.close()
        self.source.close()


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[Gpu]:
    gpu = Gpu(tmp_path)
    yield gpu
    gpu.close()


def test_rows_arrive_whole_and_bytes_are_counted(gpu: Gpu) -> None:
    moved = [gpu.transfers.submit(KEYS[2 * slot], slot, demand=slot % 2 == 0) for slot in range(N_SLOTS)]
    for transfer in moved:
        gpu.transfers.wait_any([transfer])
        assert transfer.state is TransferState.DONE and transfer.moved_bytes == ROW_BYTES
        assert gpu.slot(transfer.slot) == row_of(transfer.key, ROW_BYTES)
    assert gpu.driver.read("n_copied") == N_SLOTS * ROW_BYTES


def test_memory_is_pinned_at_its_exact_size_and_given_back(gpu: Gpu) -> None:
    assert gpu.driver.read("n_pinned") == gpu.path.stat().st_size == N_EXPERTS * ROW_BYTES
    assert gpu.driver.read("n_streams") == N_THREADS + 1 and gpu.driver.read("n_live_events") == N_SLOTS
    gpu.close()
    for counter in ("n_pinned", "n_streams", "n_live_events"):
        assert gpu.driver.read(counter) == 0
    gpu.close()


def test_a_copy_waits_for_the_kernels_that_read_the_slots_last_expert(gpu: Gpu) -> None:
    first = gpu.transfers.submit(KEYS[0], 0, demand=True)
    gpu.transfers.wait_any([first])
    assert gpu.driver.read("n_waits") == 0  # nobody has read that slot yet
    gpu.driver.keep_computing(True)
    gpu.fences.raise_at(0)
    held = gpu.transfers.submit(KEYS[1], 0, demand=True)
    time.sleep(0.02)
    assert held.state is TransferState.RUNNING and not held.settled and gpu.slot(0) == row_of(KEYS[0], ROW_BYTES)
    gpu.driver.keep_computing(False)
    gpu.transfers.wait_any([held])
    assert gpu.slot(0) == row_of(KEYS[1], ROW_BYTES)


def test_a_cancelled_prefetch_stops_between_chunks(gpu: Gpu) -> None:
    gpu.driver.keep_computing(True)
    gpu.fences.raise_at(3)
    prefetch = gpu.transfers.submit(KEYS[5], 3, demand=False)
    while prefetch.state is TransferState.QUEUED:
        time.sleep(0.001)
    gpu.transfers.cancel(prefetch)
    gpu.driver.keep_computing(False)
    gpu.transfers.wait_any([prefetch])
    assert prefetch.state is TransferState.CANCELLED
    assert prefetch.moved_bytes == gpu.driver.read("n_copied") <= N_THREADS * CHUNK


def test_the_drivers_error_names_the_expert(gpu: Gpu) -> None:
    gpu.driver.fail_copy(1)
    broken = gpu.transfers.submit(KEYS[4], 2, demand=True)
    gpu.transfers.wait_any([broken])
    assert broken.state is TransferState.FAILED
    with pytest.raises(TransferError, match="layer 0 expert 4 .*illegal memory access .*error 700"):
        raise broken.error or AssertionError
    again = gpu.transfers.submit(KEYS[4], 2, demand=True)
    gpu.transfers.wait_any([again])
    assert gpu.slot(2) == row_of(KEYS[4], ROW_BYTES)


def test_kernels_and_the_cpu_find_rows_in_pinned_memory(gpu: Gpu) -> None:
    assert gpu.source.mapped_address(KEYS[3]) == gpu.source.memory.address + 3 * ROW_BYTES
    assert gpu.source.row(KEYS[3]) == row_of(KEYS[3], ROW_BYTES)


def test_a_bare_read_goes_where_it_is_told(gpu: Gpu) -> None:
    gpu.source.read_to(KEYS[7], 0, address_of(gpu.slot(5)), ROW_BYTES)
    assert gpu.slot(5) == row_of(KEYS[7], ROW_BYTES) and gpu.driver.read("n_copied") == ROW_BYTES


def test_a_truncated_file_is_reported(gpu: Gpu) -> None:
    beyond = gpu.transfers.submit(ExpertKey(0, N_EXPERTS), 0, demand=True)
    gpu.transfers.wait_any([beyond])
    with pytest.raises(TransferError, match="truncated"):
        raise beyond.error or AssertionError


def test_what_cannot_be_set_up_is_refused(gpu: Gpu, tmp_path: Path) -> None:
    place = gpu.path, lambda key: key[1] * ROW_BYTES, ROW_BYTES
    large = tmp_path / "large.pack"
    large.write_bytes(bytes(10**7))
    with pytest.raises(CapacityError, match=r"0\.01 GB of RAM cannot be pinned"):  # the stand-in pins one buffer at a time
        PinnedSource(large, *place[1:], gpu.driver, N_THREADS)
    with pytest.raises(ConfigError, match=r"tier\.n_threads"):
        PinnedSource(*place, gpu.driver, 64)
    with pytest.raises(ConfigError, match=r"backend=cuda needs the CUDA driver, and no-such-driver\.so"):
        CudaDriver("no-such-driver.so")


def test_taking_down_hides_no_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the kernel's own fault"), closing(Gpu(tmp_path)) as gpu:
        gpu.driver.die()
        raise RuntimeError("the kernel's own fault")
    for counter in ("n_pinned", "n_streams", "n_live_events"):
        assert gpu.driver.read(counter) == 0


def test_memory_is_unpinned_where_the_rest_cannot_be_set_up(tmp_path: Path) -> None:
    path = tmp_path / "experts.pack"
    path.write_bytes(row_of(KEYS[0], ROW_BYTES))
    (tmp_path / "libraries").mkdir()
    driver = StandInDriver(tmp_path / "libraries")
    driver.fail_stream(1)
    with pytest.raises(TransferError, match="cuStreamCreate failed"):
        PinnedSource(path, lambda key: 0, ROW_BYTES, driver, N_THREADS)
    assert driver.read("n_pinned") == driver.read("n_streams") == 0
