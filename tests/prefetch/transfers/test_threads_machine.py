"""ThreadTransfers with one worker against a plain model of its two queues, chunk by chunk."""

import time
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefetch.geometry import PAGE_BYTES, ExpertKey
from prefetch.transfers.base import Transfer, TransferState
from prefetch.transfers.link import EmulatedLink
from prefetch.transfers.threads import ThreadTransfers
from tests.prefetch.transfers.gated_source import PATIENCE_S, GatedSource, row_of

CHUNK = PAGE_BYTES


@dataclass(eq=False)
class Expected:
    """What the model believes of one transfer."""

    real: Transfer
    demand: bool
    waiting: list[int]  # starts of the chunks nobody has taken
    moved: int = 0
    cancelled: bool = False


@dataclass
class Model:
    demands: list[Expected] = field(default_factory=list)
    prefetches: list[Expected] = field(default_factory=list)
    on_worker: tuple[Expected, int] | None = None  # the chunk under way

    def next_chunk(self) -> None:
        """The idle worker takes the first chunk of the first demand, else of the first prefetch."""
        for queue in (self.demands, self.prefetches):
            for expected in queue:
                if self.on_worker is None and expected.waiting:
                    self.on_worker = (expected, expected.waiting.pop(0))


class TransfersMachine(RuleBasedStateMachine):
    @initialize(n_chunks=st.integers(1, 4), ragged=st.booleans(), linked=st.booleans())
    def begin(self, n_chunks, ragged, linked):
        self.row_bytes = n_chunks * CHUNK - (100 if ragged else 0)
        self.source = GatedSource(self.row_bytes)
        self.rows: list[bytearray] = []
        link = EmulatedLink(bytes_per_s=1e12, latency_s=0.0) if linked else None
        self.transfers = ThreadTransfers(
            self.source, lambda slot: memoryview(self.rows[slot]), n_threads=1, chunk_bytes=CHUNK, link=link
        )
        self.model = Model()
        self.known: list[Expected] = []
        self.reads: list[tuple[ExpertKey, int]] = []  # in the order the model expects

    @rule(demand=st.booleans())
    def submit(self, demand):
        slot = len(self.rows)
        self.rows.append(bytearray(self.row_bytes))
        real = self.transfers.submit(ExpertKey(1, slot), slot, demand=demand)
        expected = Expected(real, demand, list(range(0, self.row_bytes, CHUNK)))
        (self.model.demands if demand else self.model.prefetches).append(expected)
        self.known.append(expected)
        self._worker_catches_up()

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def promote(self, data):
        expected = data.draw(st.sampled_from(self.known))
        self.transfers.promote(expected.real)
        if not expected.demand and not expected.real.settled:
            expected.demand = True
            self.model.prefetches.remove(expected)
            self.model.demands.append(expected)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def cancel(self, data):
        expected = data.draw(st.sampled_from(self.known))
        self.transfers.cancel(expected.real)
        if expected.waiting or self._on_worker(expected):
            expected.cancelled = True
            expected.waiting.clear()

    @precondition(lambda self: self.model.on_worker)
    @rule()
    def finish_chunk(self):
        expected, start = self.model.on_worker
        self.model.on_worker = None
        expected.moved += min(CHUNK, self.row_bytes - start)
        self.source.allow()
        self._worker_catches_up()

    @precondition(lambda self: any(expected.real.settled for expected in self.known))
    @rule()
    def wait_for_all(self):
        reals = [expected.real for expected in self.known]
        settled = [expected.real for expected in self.known if self._over(expected)]
        assert self.transfers.wait_any(reals) == settled

    @invariant()
    def agrees_with_the_model(self):
        left = 0
        for expected in self.known:
            real = expected.real
            assert real.state is self._state(expected)
            assert real.moved_bytes == expected.moved and real.demand == expected.demand and real.error is None
            left += sum(min(CHUNK, self.row_bytes - start) for start in expected.waiting)
            if real.state is TransferState.DONE:
                assert self.rows[real.slot] == row_of(real.key, self.row_bytes)
        if self.known:
            if self.model.on_worker:
                left += min(CHUNK, self.row_bytes - self.model.on_worker[1])
            assert self.transfers.queued_bytes == left

    def teardown(self):
        if not hasattr(self, "source"):
            return
        self.source.open()
        self.transfers.close()
        assert all(expected.real.settled for expected in self.known)
        assert self.transfers.queued_bytes == 0

    def _on_worker(self, expected: Expected) -> bool:
        return self.model.on_worker is not None and self.model.on_worker[0] is expected

    def _state(self, expected: Expected) -> TransferState:
        if self._on_worker(expected) or (expected.waiting and expected.moved):
            return TransferState.RUNNING
        if expected.waiting:
            return TransferState.QUEUED
        return TransferState.CANCELLED if expected.cancelled else TransferState.DONE

    def _worker_catches_up(self) -> None:
        """Let the real worker account for its last chunk and take its next one, then compare which one it took."""
        had_one = self.model.on_worker
        self.model.next_chunk()
        if self.model.on_worker is not had_one:
            expected, start = self.model.on_worker
            self.reads.append((expected.real.key, start))
            assert self.source.await_reads(len(self.reads)) == self.reads
        deadline_s = time.monotonic() + PATIENCE_S
        while any(expected.real.settled != self._over(expected) for expected in self.known):
            assert time.monotonic() < deadline_s
            time.sleep(0.0001)

    def _over(self, expected: Expected) -> bool:
        return not expected.waiting and not self._on_worker(expected)


TransfersMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTransfersMachine = TransfersMachine.TestCase
