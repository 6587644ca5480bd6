"""ThreadTransfers: order, accounting, faults, an end without leftovers."""

import os
import random
import signal
import threading
import time
import zlib
from pathlib import Path

import pytest

from prefetch.errors import ConfigError, PackError, TransferError
from prefetch.geometry import PAGE_BYTES, ExpertKey
from prefetch.memory import allocate_pages
from prefetch.transfers.base import Transfer, TransferState
from prefetch.transfers.link import EmulatedLink
from prefetch.transfers.sources import DiskSource, HostSource
from prefetch.transfers.threads import ThreadTransfers
from tests.prefetch.transfers.gated_source import PATIENCE_S, GatedSource, row_of

CHUNK = PAGE_BYTES
N_CHUNKS = 3
ROW_BYTES = N_CHUNKS * CHUNK - PAGE_BYTES // 2  # the last chunk is a short one
N_SLOTS = 16
A, B, C, D = (ExpertKey(0, expert) for expert in range(4))


class Slots:
    """Page-aligned rows, as `SlotPool` has them."""

    def __init__(self, row_bytes: int = ROW_BYTES):
        stride = -(-row_bytes // PAGE_BYTES) * PAGE_BYTES
        whole = memoryview(allocate_pages(N_SLOTS * stride, "a test"))
        self.rows = [whole[slot * stride : slot * stride + row_bytes] for slot in range(N_SLOTS)]

    def buffer(self, slot: int) -> memoryview:
        return self.rows[slot]


@pytest.fixture
def start():
    """Builds transfers over a source; whatever is left running is released and closed at the end."""
    started = []

    def build(source, slots=None, n_threads=1, **options) -> ThreadTransfers:
        transfers = ThreadTransfers(
            source, (slots or Slots(source.row_bytes)).buffer, n_threads=n_threads, chunk_bytes=CHUNK, **options
        )
        started.append((source, transfers))
        return transfers

    yield build
    for source, transfers in started:
        if isinstance(source, GatedSource):
            source.open()
        transfers.close()


def settle(transfers: ThreadTransfers, *waited: Transfer) -> None:
    """Wait for all of `waited`, without helping, however long a worker needs."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not all(transfer.settled for transfer in waited):
        assert time.monotonic() < deadline_s, waited
        time.sleep(0.001)


def threads_of_process() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def assert_gone(threads: set[str]) -> None:
    """A thread that has been joined may stay in the kernel's list for a moment."""
    deadline_s = time.monotonic() + PATIENCE_S
    while threads & threads_of_process():
        assert time.monotonic() < deadline_s, threads
        time.sleep(0.001)


def descriptors_of(path: Path) -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(link) and os.readlink(link) == str(path) for link in links)


@pytest.fixture
def pack(tmp_path) -> Path:
    path = tmp_path / "experts.pack"
    path.write_bytes(b"".join(row_of(ExpertKey(0, expert), N_CHUNKS * CHUNK) for expert in range(N_SLOTS)))
    return path


def disk(pack: Path) -> DiskSource:
    return DiskSource(pack, lambda key: key[1] * N_CHUNKS * CHUNK, N_CHUNKS * CHUNK)


def test_demand_overtakes_prefetches_after_the_chunk_under_way(start):
    source = GatedSource(ROW_BYTES)
    transfers = start(source)
    prefetches = [transfers.submit(A, 0, demand=False), transfers.submit(B, 1, demand=False)]
    source.await_reads(1)
    demands = [transfers.submit(C, 2, demand=True), transfers.submit(D, 3, demand=True)]
    source.open()
    settle(transfers, *prefetches, *demands)
    chunks = [0, CHUNK, 2 * CHUNK]
    order = [(C, start) for start in chunks] + [(D, start) for start in chunks]
    assert source.reads == [(A, 0), *order, (A, CHUNK), (A, 2 * CHUNK), *((B, start) for start in chunks)]
    assert demands[1].finished_s <= prefetches[0].finished_s
    assert all(t.submitted_s <= t.started_s <= t.finished_s for t in prefetches + demands)


def test_promoted_prefetch_goes_with_the_demands(start):
    source = GatedSource(ROW_BYTES)
    transfers = start(source)
    running, queued, last = (transfers.submit(key, slot, demand=False) for slot, key in enumerate((A, B, C)))
    source.await_reads(1)
    transfers.promote(last)
    transfers.promote(running)
    assert last.demand and running.demand and not queued.demand
    source.open()
    settle(transfers, running, queued, last)
    keys = [key for key, start in source.reads if start == 0 or key == A]
    assert keys == [A, C, A, A, B]


def test_cancelled_prefetches(start):
    source = GatedSource(ROW_BYTES)
    transfers = start(source)
    running, queued = transfers.submit(A, 0, demand=False), transfers.submit(B, 1, demand=False)
    source.await_reads(1)
    transfers.cancel(queued)
    assert queued.state is TransferState.CANCELLED and queued.moved_bytes == 0
    transfers.cancel(running)
    transfers.cancel(running)
    assert running.state is TransferState.RUNNING  # its chunk still writes into the slot
    assert transfers.queued_bytes == CHUNK
    source.allow()
    settle(transfers, running)
    assert running.state is TransferState.CANCELLED and running.moved_bytes == CHUNK
    assert transfers.queued_bytes == 0
    done = transfers.submit(C, 2, demand=False)
    source.open()
    settle(transfers, done)
    transfers.cancel(done)
    transfers.promote(done)
    assert done.state is TransferState.DONE and not done.demand
    assert [key for key, _ in source.reads] == [A, C, C, C]


def test_waiting_thread_moves_demand_chunks_itself(start):
    """The only worker is stuck in a prefetch; the demand arrives all the same."""
    slots = Slots()
    source = GatedSource(ROW_BYTES, gated=lambda key: key == A)
    transfers = start(source, slots)
    prefetch = transfers.submit(A, 0, demand=False)
    source.await_reads(1)
    demands = [transfers.submit(B, 1, demand=True), transfers.submit(C, 2, demand=True)]
    assert transfers.wait_any([*demands, prefetch]) == [demands[0]]
    assert transfers.wait_any([prefetch, demands[1]]) == [demands[1]]
    assert transfers.wait_any([prefetch, demands[1], demands[0]]) == [demands[1], demands[0]]
    assert prefetch.state is TransferState.RUNNING
    assert slots.buffer(1) == row_of(B, ROW_BYTES) and slots.buffer(2) == row_of(C, ROW_BYTES)
    assert transfers.wait_any([]) == []


def test_waiting_thread_is_woken_by_a_worker(start):
    source = GatedSource(ROW_BYTES)
    transfers = start(source)
    prefetch = transfers.submit(A, 0, demand=False)
    source.await_reads(1)
    opener = threading.Timer(0.05, source.open)
    opener.start()
    assert transfers.wait_any([prefetch]) == [prefetch]
    assert prefetch.state is TransferState.DONE
    opener.join()


def test_a_large_transfer_is_moved_by_several_threads(start):
    slots = Slots()
    source = GatedSource(ROW_BYTES)
    transfers = start(source, slots, n_threads=N_CHUNKS)
    prefetch = transfers.submit(A, 0, demand=False)
    assert sorted(source.await_reads(N_CHUNKS)) == [(A, 0), (A, CHUNK), (A, 2 * CHUNK)]
    source.open()
    settle(transfers, prefetch)
    assert slots.buffer(0) == row_of(A, ROW_BYTES)


def test_an_emulated_link_carries_one_chunk_at_a_time_by_priority(start):
    source = GatedSource(ROW_BYTES)
    transfers = start(source, n_threads=3, link=EmulatedLink(bytes_per_s=1e12, latency_s=0.0))
    prefetch = transfers.submit(A, 0, demand=False)
    source.await_reads(1)
    late_prefetch, demand = transfers.submit(B, 1, demand=False), transfers.submit(C, 2, demand=True)
    source.open()
    settle(transfers, prefetch, late_prefetch, demand)
    assert source.most_inside == 1
    assert [key for key, _ in source.reads] == [A, C, C, C, A, A, B, B, B]


def test_an_emulated_link_sets_the_pace(start):
    """No transfer may finish before a serial link of that speed could have delivered it."""
    latency_s, bytes_per_s = 0.0005, 20e6
    link = EmulatedLink(bytes_per_s, latency_s)
    source = GatedSource(ROW_BYTES, gated=lambda key: False)
    transfers = start(source, n_threads=2, link=link)
    queued = [transfers.submit(key, slot, demand=slot % 2 == 0) for slot, key in enumerate((A, B, C, D))]
    waiting = list(queued)
    while waiting:
        settled = transfers.wait_any(waiting)
        waiting = [transfer for transfer in waiting if transfer not in settled]
    each_s = N_CHUNKS * latency_s + ROW_BYTES / bytes_per_s
    finished_s = sorted(transfer.finished_s for transfer in queued)
    for n, done_s in enumerate(finished_s, start=1):
        assert done_s >= queued[0].submitted_s + n * each_s - 1e-9
    assert link.n_requests == 4 * N_CHUNKS
    assert link.busy_until_s <= queued[-1].submitted_s + 4 * each_s + 1e-9  # nor does the schedule ever idle


@pytest.mark.parametrize("n_threads", [1, 4])
@pytest.mark.parametrize("tier", [DiskSource, HostSource])
def test_every_byte_arrives_and_is_accounted_for(start, pack, tier, n_threads):
    """A random mix of submissions, promotions, cancellations and waits over real files."""
    source = tier(pack, lambda key: key[1] * N_CHUNKS * CHUNK, N_CHUNKS * CHUNK)
    slots = Slots(source.row_bytes)
    transfers = start(source, slots, n_threads)
    chance = random.Random(n_threads)
    under_way: list[Transfer] = []
    finished: list[Transfer] = []
    for step in range(800):
        if len(under_way) == N_SLOTS or (under_way and chance.random() < 0.3):
            finished += (settled := transfers.wait_any(under_way))
            for transfer in settled:
                if transfer.state is TransferState.DONE:
                    assert slots.buffer(transfer.slot) == row_of(transfer.key, source.row_bytes)
                    slots.buffer(transfer.slot)[:] = bytes(source.row_bytes)
            under_way = [transfer for transfer in under_way if transfer not in settled]
        slot = min(set(range(N_SLOTS)) - {transfer.slot for transfer in under_way})
        under_way.append(transfers.submit(ExpertKey(0, step % N_SLOTS), slot, demand=chance.random() < 0.4))
        chosen = chance.choice(under_way)
        if not chosen.demand:
            chance.choice((transfers.promote, transfers.cancel))(chosen)
    while under_way:
        finished += (settled := transfers.wait_any(under_way))
        under_way = [transfer for transfer in under_way if transfer not in settled]
    assert transfers.queued_bytes == 0
    assert len(finished) == 800
    by_state = {state: [t for t in finished if t.state is state] for state in TransferState}
    assert len(by_state[TransferState.DONE]) + len(by_state[TransferState.CANCELLED]) == 800
    assert all(transfer.moved_bytes == source.row_bytes for transfer in by_state[TransferState.DONE])
    assert all(transfer.moved_bytes % CHUNK == 0 for transfer in by_state[TransferState.CANCELLED])


def test_truncated_file_fails_the_transfer_and_only_that(start, pack):
    os.truncate(pack, 2 * N_CHUNKS * CHUNK + CHUNK + 10)
    transfers = start(disk(pack), n_threads=2)
    good, cut, absent = (transfers.submit(key, slot, demand=True) for slot, key in enumerate((A, C, D)))
    while not all(transfer.settled for transfer in (good, cut, absent)):
        transfers.wait_any([transfer for transfer in (good, cut, absent) if not transfer.settled])
    assert good.state is TransferState.DONE and good.error is None
    for failed in (cut, absent):
        assert failed.state is TransferState.FAILED and isinstance(failed.error, TransferError)
        assert f"layer 0 expert {failed.key.expert}" in str(failed.error) and str(pack) in str(failed.error)
        assert failed.moved_bytes < failed.n_bytes
    assert transfers.queued_bytes == 0
    again = transfers.submit(B, 3, demand=False)  # the workers are still alive
    settle(transfers, again)
    assert again.state is TransferState.DONE


@pytest.mark.parametrize("demand", [True, False])
def test_read_error_of_the_device_surfaces(start, demand):
    """/proc/self/mem answers EIO at address 0."""
    transfers = start(DiskSource("/proc/self/mem", lambda key: 0, CHUNK))
    transfer = transfers.submit(A, 0, demand=demand)
    assert transfers.wait_any([transfer]) == [transfer]
    assert transfer.state is TransferState.FAILED
    assert "Input/output error" in str(transfer.error)


@pytest.mark.parametrize("demand", [True, False])
def test_damaged_row_fails_its_check(start, pack, demand):
    checksums = {key: zlib.crc32(row_of(key, N_CHUNKS * CHUNK)) for key in (A, B)}
    content = bytearray(pack.read_bytes())
    content[N_CHUNKS * CHUNK + 5000] ^= 4
    pack.write_bytes(content)

    def check(key: ExpertKey, row: memoryview) -> None:
        if zlib.crc32(row) != checksums[key]:
            raise PackError(f"{pack}: expert {key[1]} is damaged")

    transfers = start(disk(pack), check=check)
    good, damaged = transfers.submit(A, 0, demand=demand), transfers.submit(B, 1, demand=demand)
    for transfer in (good, damaged):
        transfers.wait_any([transfer])
    assert good.state is TransferState.DONE
    assert damaged.state is TransferState.FAILED and damaged.moved_bytes == damaged.n_bytes
    assert isinstance(damaged.error, TransferError) and "expert 1 is damaged" in str(damaged.error)
    assert isinstance(damaged.error.__cause__, PackError)


def test_interrupt_of_a_helping_thread_fails_its_transfer_and_nothing_else(start):
    """Ctrl-C comes while the waiting thread checks a row; everything else it does is native, and ends before Python looks."""

    def check(key: ExpertKey, row: memoryview) -> None:
        if key == B:
            signal.raise_signal(signal.SIGINT)
            time.sleep(PATIENCE_S)

    source = GatedSource(ROW_BYTES, gated=lambda key: key == A)
    transfers = start(source, check=check)
    prefetch = transfers.submit(A, 0, demand=False)
    source.await_reads(1)  # so that only this thread can move B
    demand = transfers.submit(B, 1, demand=True)
    with pytest.raises(KeyboardInterrupt):
        transfers.wait_any([demand])
    assert demand.state is TransferState.FAILED and "KeyboardInterrupt" in str(demand.error)
    source.open()
    after = transfers.submit(C, 2, demand=True)
    settle(transfers, prefetch, after)
    assert after.state is TransferState.DONE and transfers.queued_bytes == 0


def test_close_while_busy_leaves_nothing_behind(pack):
    for _ in range(5):
        others = threads_of_process()
        source = disk(pack)
        transfers = ThreadTransfers(source, Slots(N_CHUNKS * CHUNK).buffer, n_threads=3, chunk_bytes=CHUNK)
        workers = threads_of_process() - others
        assert len(workers) == 3 and descriptors_of(pack) == 1
        submitted = [transfers.submit(ExpertKey(0, slot), slot, demand=slot < 3) for slot in range(N_SLOTS) for _ in range(20)]
        transfers.close()
        transfers.close()
        assert_gone(workers)
        source.close()
        assert descriptors_of(pack) == 0
        assert all(transfer.settled for transfer in submitted)
        assert submitted[-1].state is TransferState.CANCELLED
        assert transfers.queued_bytes == 0
        with pytest.raises(TransferError, match="closed"):
            transfers.submit(A, 0, demand=True)


def test_close_releases_a_waiting_thread(start):
    source = GatedSource(ROW_BYTES)
    transfers = start(source)
    running, queued = transfers.submit(A, 0, demand=False), transfers.submit(B, 1, demand=False)
    source.await_reads(1)
    seen: list[Transfer] = []
    waiter = threading.Thread(target=lambda: seen.extend(transfers.wait_any([queued])))
    waiter.start()
    closer = threading.Thread(target=transfers.close)
    closer.start()
    waiter.join(PATIENCE_S)
    assert seen == [queued] and queued.state is TransferState.CANCELLED
    source.allow()
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    assert running.state is TransferState.CANCELLED and running.moved_bytes == CHUNK


def test_close_cuts_a_slow_link(pack):
    others = threads_of_process()
    transfers = ThreadTransfers(
        disk(pack), Slots(N_CHUNKS * CHUNK).buffer, n_threads=2, chunk_bytes=CHUNK, link=EmulatedLink(1.0, 0.0)
    )
    transfer = transfers.submit(A, 0, demand=False)
    workers = threads_of_process() - others
    transfers.close()
    assert transfer.settled and len(workers) == 2
    assert_gone(workers)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"n_threads": 0, "chunk_bytes": CHUNK}, "n_threads"), ({"n_threads": 1, "chunk_bytes": 1000}, "chunk_bytes")],
)
def test_impossible_options_are_named(options, named):
    with pytest.raises(ConfigError, match=named):
        ThreadTransfers(GatedSource(ROW_BYTES), Slots().buffer, **options)


def test_no_prefetch_begins_while_a_demand_load_moves(start):
    source = GatedSource(CHUNK)
    transfers = start(source, n_threads=4)
    demand = transfers.submit(A, 0, demand=True)
    source.await_reads(1)
    prefetches = [transfers.submit(key, slot, demand=False) for slot, key in enumerate((B, C), start=1)]
    promoted = transfers.submit(D, 3, demand=False)
    transfers.promote(promoted)
    assert source.await_reads(2) == [(A, 0), (D, 0)]
    assert all(transfer.state is TransferState.QUEUED for transfer in prefetches)
    source.allow(2)
    settle(transfers, demand, promoted)
    source.await_reads(4)
    transfers.promote(prefetches[0])  # it is running: from now on it is a demand load as well
    last = transfers.submit(A, 4, demand=False)
    source.open()
    settle(transfers, *prefetches, last)
    assert all(transfer.state is TransferState.DONE for transfer in (*prefetches, last))
