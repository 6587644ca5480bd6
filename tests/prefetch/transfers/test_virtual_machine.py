"""VirtualTransfers against a plain model that lives through every tick of its link."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefetch.clock import START_S, VirtualClock
from prefetch.geometry import ExpertKey
from prefetch.transfers.base import Transfer, TransferState
from prefetch.transfers.virtual import VirtualTransfers

TICK_S = 1 / 64  # in which the link moves one byte; sums of ticks are exact


@dataclass(eq=False)
class Expected:
    """What the model believes of one transfer. Times are ticks."""

    real: Transfer
    demand: bool
    waiting: list[int]  # sizes of the chunks that have not begun
    submitted: int
    started: int | None = None
    finished: int | None = None
    moved: int = 0
    cancelled: bool = False

    @property
    def state(self) -> TransferState:
        if self.finished is not None:
            return TransferState.CANCELLED if self.cancelled else TransferState.DONE
        return TransferState.QUEUED if self.started is None else TransferState.RUNNING


@dataclass
class Model:
    latency: int
    now: int = 0
    line: list[Expected] = field(default_factory=list)  # demand loads in the order in which they became it, and prefetches
    on_link: Expected | None = None
    size: int = 0  # of the chunk under way
    left: int = 0  # ticks of it

    def begin(self) -> None:
        candidates = [one for one in self.line if one.waiting]
        if self.on_link is None and candidates:
            first = next((one for one in candidates if one.demand), candidates[0])
            self.on_link, self.size = first, first.waiting.pop(0)
            self.left = self.latency + self.size
            first.started = self.now if first.started is None else first.started

    def tick(self) -> None:
        self.now += 1
        if self.on_link is None:
            return
        self.left -= 1
        if self.left == 0:
            self.arrive()

    def arrive(self) -> None:
        arrived, self.on_link = self.on_link, None
        arrived.moved += self.size
        arrived.finished = None if arrived.waiting else self.now
        self.begin()

    def cancel(self, one: Expected) -> None:
        if one.finished is None:
            one.cancelled, one.waiting = True, []
            one.finished = None if one is self.on_link else self.now

    @property
    def queued_bytes(self) -> int:
        return sum(sum(one.waiting) for one in self.line) + (self.size if self.on_link else 0)


def seconds(ticks: int | None) -> float:
    return 0.0 if ticks is None else START_S + ticks * TICK_S


class VirtualMachine(RuleBasedStateMachine):
    @initialize(row=st.integers(1, 12), chunk=st.integers(1, 5), latency=st.integers(0, 3), looked_at=st.booleans())
    def begin(self, row, chunk, latency, looked_at):
        self.row, self.looked_at = row, looked_at  # looking must change nothing: some runs are looked at only in the end
        self.sizes = [min(chunk, row - start) for start in range(0, row, chunk)]
        self.clock, self.model = VirtualClock(), Model(latency)
        self.transfers = VirtualTransfers(
            self.clock, row_bytes=row, bytes_per_s=1 / TICK_S, latency_s=latency * TICK_S, chunk_bytes=chunk
        )

    @rule(demand=st.booleans(), ticks=st.integers(0, 3))
    def submit(self, demand, ticks):
        self.pass_time(ticks)
        real = self.transfers.submit(ExpertKey(0, 0), 0, demand=demand)
        self.model.line.append(Expected(real, demand, list(self.sizes), self.model.now))
        self.model.begin()

    @precondition(lambda self: self.model.line)
    @rule(data=st.data())
    def promote(self, data):
        one = data.draw(st.sampled_from(self.model.line))
        self.transfers.promote(one.real)
        if not one.demand and one.finished is None:
            one.demand = True
            self.model.line.remove(one)
            self.model.line.append(one)

    @precondition(lambda self: self.model.line)
    @rule(data=st.data())
    def cancel(self, data):
        one = data.draw(st.sampled_from(self.model.line))
        self.transfers.cancel(one.real)
        self.model.cancel(one)

    @rule(ticks=st.integers(0, 12))
    def pass_time(self, ticks):
        self.clock.advance(ticks * TICK_S)
        for _ in range(ticks):
            self.model.tick()

    @precondition(lambda self: self.model.line)
    @rule(data=st.data())
    def wait(self, data):
        waited = data.draw(st.lists(st.sampled_from(self.model.line), min_size=1, max_size=4, unique=True))
        while all(one.finished is None for one in waited):
            self.model.tick()
        expected = [one.real for one in waited if one.finished is not None]
        assert self.transfers.wait_any([one.real for one in waited]) == expected
        assert self.clock() == seconds(self.model.now)

    @invariant()
    def agrees_with_the_model(self):
        if self.looked_at:
            self.compare()

    def compare(self):
        assert self.transfers.queued_bytes == self.model.queued_bytes
        for one in self.model.line:
            real = one.real
            assert (real.state, real.settled) == (one.state, one.finished is not None)
            assert (real.demand, real.moved_bytes, real.n_bytes) == (one.demand, one.moved, self.row)
            expected_s = seconds(one.submitted), seconds(one.started), seconds(one.finished)
            assert (real.submitted_s, real.started_s, real.finished_s) == expected_s

    def teardown(self):
        if not hasattr(self, "model"):
            return
        self.compare()
        for one in self.model.line:
            self.model.cancel(one)
        if self.model.on_link:
            self.model.arrive()  # at once: the link is cut
        self.transfers.close()
        self.compare()


VirtualMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestVirtualMachine = VirtualMachine.TestCase
