"""VirtualTransfers and ThreadTransfers over an emulated link make the same of the same program."""

import time
from dataclasses import dataclass, field
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch.clock import VirtualClock
from prefetch.geometry import PAGE_BYTES, ExpertKey
from prefetch.transfers.base import Transfer, Transfers, TransferState
from prefetch.transfers.link import EmulatedLink
from prefetch.transfers.threads import ThreadTransfers
from prefetch.transfers.virtual import VirtualTransfers
from tests.prefetch.transfers.gated_source import PATIENCE_S, GatedSource

CHUNK = PAGE_BYTES
ROW = 3 * CHUNK - 100
CHUNKS_OF = {0: 0, CHUNK: 1, 2 * CHUNK: 2, ROW: 3}  # by bytes moved
WHAT = st.sampled_from(["demand", "prefetch", "promote", "cancel", "chunk", "chunk", "chunk"])


@dataclass
class Side:
    """One implementation, and what it has been given."""

    transfers: Transfers
    submitted: list[Transfer] = field(default_factory=list)

    def act(self, what: str, target: int) -> None:
        if what in ("demand", "prefetch"):
            slot = len(self.submitted)
            self.submitted.append(self.transfers.submit(ExpertKey(0, slot), slot, demand=what == "demand"))
        elif what == "close":
            self.transfers.close()
        elif self.submitted:
            act = self.transfers.promote if what == "promote" else self.transfers.cancel
            act(self.submitted[target % len(self.submitted)])

    def view(self) -> list[tuple[TransferState, bool, int]]:
        return [(transfer.state, transfer.demand, transfer.moved_bytes) for transfer in self.submitted]

    def completions(self) -> list[int]:
        """Slots in the order in which their transfers settled, of those that moved something."""
        moved = [transfer for transfer in self.submitted if transfer.settled and transfer.moved_bytes]
        return [transfer.slot for transfer in sorted(moved, key=lambda transfer: transfer.finished_s)]


def threads_side(source: GatedSource, link: EmulatedLink) -> Side:
    rows = [bytearray(ROW) for _ in range(40)]
    return Side(ThreadTransfers(source, lambda slot: memoryview(rows[slot]), n_threads=2, chunk_bytes=CHUNK, link=link))


def await_agreement(real: Side, virtual: Side, source: GatedSource) -> None:
    """Let the threads account for their last chunk and take the next one."""
    view = virtual.view()
    n_arrived = sum(CHUNKS_OF[moved] for _, _, moved in view)
    source.await_reads(n_arrived + (virtual.transfers.queued_bytes > 0))
    deadline_s = time.monotonic() + PATIENCE_S
    while (real.view(), real.transfers.queued_bytes) != (view, virtual.transfers.queued_bytes):
        assert time.monotonic() < deadline_s, (real.view(), view)
        time.sleep(0.0001)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(WHAT, st.integers(0, 39)), min_size=5, max_size=40))
def test_same_states_chunk_by_chunk(program):
    """The real chunks arrive when the test lets them: no timing decides anything."""
    clock, source = VirtualClock(), GatedSource(ROW)
    virtual = Side(VirtualTransfers(clock, row_bytes=ROW, bytes_per_s=inf, latency_s=1.0, chunk_bytes=CHUNK))
    real = threads_side(source, EmulatedLink(bytes_per_s=1e12, latency_s=0.0))
    try:
        for what, target in program:
            if what != "chunk":
                real.act(what, target)
                virtual.act(what, target)
            elif virtual.transfers.queued_bytes:
                source.allow()
                clock.advance(1.0)
            await_agreement(real, virtual, source)
        assert real.completions() == virtual.completions()
    finally:
        source.open()
        real.transfers.close()


CHUNK_S = 0.006  # over the slow link
SLOW_LINK = {"bytes_per_s": CHUNK / (CHUNK_S / 2), "latency_s": CHUNK_S / 2}
PROGRAM = [  # when, in chunks: always half a chunk away from where one ends
    *[(0.0, "prefetch", 0)] * 3,
    (1.5, "demand", 0),  # moves from 2 to 5
    (2.5, "promote", 2),
    (3.5, "cancel", 1),
    (5.5, "demand", 0),
    (6.5, "cancel", 2),  # ends at 7, when the second demand load begins
    (9.5, "prefetch", 0),
    (10.5, "cancel", 3),  # too late; the first prefetch moves its last chunk
    (14.5, "prefetch", 0),  # the link has been idle for half a chunk
    (15.0, "demand", 0),
    (19.0, "close", 0),
]


def run_slowly() -> tuple[Side, list[float], EmulatedLink]:
    """The program over a real link of some milliseconds a chunk, and when each act came."""
    source, link = GatedSource(ROW, gated=lambda key: False), EmulatedLink(**SLOW_LINK)
    real, acted_s = threads_side(source, link), []
    began_s = time.perf_counter()
    for when, what, target in PROGRAM:
        time.sleep(max(0.0, began_s + when * CHUNK_S - time.perf_counter()))
        acted_s.append(time.perf_counter())
        real.act(what, target)
    return real, acted_s, link


def replay(acted_s: list[float]) -> tuple[Side, float]:
    """The same acts at the same times, and the virtual clock's time less the real one's."""
    clock = VirtualClock()
    virtual = Side(VirtualTransfers(clock, row_bytes=ROW, chunk_bytes=CHUNK, **SLOW_LINK))
    offset_s = clock() - acted_s[0]
    for (_, what, target), at_s in zip(PROGRAM, acted_s, strict=True):
        clock.advance_to(max(clock(), at_s + offset_s))
        virtual.act(what, target)
    return virtual, offset_s


def was_in_time(acted_s: list[float], link: EmulatedLink) -> bool:
    """No act and no chunk came so late that another chunk was under way than planned."""
    late_s = max(at_s - acted_s[0] - when * CHUNK_S for at_s, (when, _, _) in zip(acted_s, PROGRAM, strict=True))
    return max(late_s, link.lateness_s) < CHUNK_S / 4


def agree(real: Side, virtual: Side, offset_s: float) -> bool:
    """Same states and order; really finished no earlier than virtually, and less than a chunk later."""
    pairs = zip(real.submitted, virtual.submitted, strict=True)
    late_s = [theirs.finished_s + offset_s - ours.finished_s for theirs, ours in pairs]
    same = real.view() == virtual.view() and real.completions() == virtual.completions()
    return same and all(-1e-6 < late < CHUNK_S for late in late_s)


def test_same_order_and_times_over_a_slow_link():
    """One attempt must agree; those that a busy machine disturbed say nothing."""
    n_in_time = 0
    for _ in range(8):
        real, acted_s, link = run_slowly()
        virtual, offset_s = replay(acted_s)
        in_time = was_in_time(acted_s, link)
        if in_time and agree(real, virtual, offset_s):
            assert [transfer.state.value for transfer in real.submitted] == [
                "done", "cancelled", "cancelled", "done", "done", "done", "cancelled", "done",
            ]  # fmt: skip
            assert virtual.completions() == [3, 2, 4, 0, 5, 7, 6]
            return
        n_in_time += in_time
    if n_in_time == 0:
        pytest.skip("the machine is too busy for a link of milliseconds")
    pytest.fail(f"really {real.view()}, virtually {virtual.view()}")
