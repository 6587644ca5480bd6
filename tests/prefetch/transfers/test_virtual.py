"""VirtualTransfers: scenarios computed by hand, and what holds of any program of submissions, promotions and cancellations."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefetch.clock import START_S, VirtualClock
from prefetch.errors import ConfigError, TransferError
from prefetch.geometry import ExpertKey
from prefetch.transfers.base import Transfer, TransferState
from prefetch.transfers.link import EmulatedLink
from prefetch.transfers.virtual import VirtualTransfers

CHUNK = 1000
CHUNK_S = 1.25  # 1 s for the bytes, 0.25 s of latency
ROW = 2 * CHUNK + CHUNK // 2  # the last chunk takes 0.75 s
ROW_S = 3.25
KEY = ExpertKey(0, 0)


def start(row_bytes: int = ROW, **changes) -> tuple[VirtualClock, VirtualTransfers]:
    clock = VirtualClock()
    link = {"bytes_per_s": CHUNK, "latency_s": 0.25, "chunk_bytes": CHUNK} | changes
    return clock, VirtualTransfers(clock, row_bytes=row_bytes, **link)


def times(transfer: Transfer) -> tuple[float, float, float]:
    """Submitted, started, finished: seconds since the clock began, 0.0 (as in `Transfer`) being -START_S."""
    return transfer.submitted_s - START_S, transfer.started_s - START_S, transfer.finished_s - START_S


def look(transfer: Transfer) -> tuple[TransferState, int]:
    return transfer.state, transfer.moved_bytes


# ---- computed by hand ----


def test_one_transfer():
    clock, transfers = start()
    clock.advance(1.0)
    one = transfers.submit(KEY, 7, demand=True)
    assert (one.key, one.slot, one.n_bytes, one.demand, one.error) == (KEY, 7, ROW, True, None)
    assert look(one) == (TransferState.RUNNING, 0) and transfers.queued_bytes == ROW
    assert one.started_s == START_S + 1.0 and one.finished_s == 0.0
    clock.advance(CHUNK_S)
    assert look(one) == (TransferState.RUNNING, CHUNK) and transfers.queued_bytes == ROW - CHUNK
    assert transfers.wait_any([one]) == [one]
    assert clock() == START_S + 1.0 + ROW_S
    assert times(one) == (1.0, 1.0, 1.0 + ROW_S)
    assert look(one) == (TransferState.DONE, ROW) and one.settled and transfers.queued_bytes == 0


def test_one_behind_the_other_and_after_a_pause():
    clock, transfers = start()
    first, second = transfers.submit(KEY, 0, demand=False), transfers.submit(KEY, 1, demand=False)
    assert second.state is TransferState.QUEUED and second.started_s == 0.0
    assert transfers.wait_any([second]) == [second]
    assert times(first) == (0.0, 0.0, ROW_S) and times(second) == (0.0, ROW_S, 2 * ROW_S)
    clock.advance(100.0)  # the link is idle; what it did not use is lost
    third = transfers.submit(KEY, 2, demand=False)
    transfers.wait_any([third])
    assert times(third) == (2 * ROW_S + 100.0, 2 * ROW_S + 100.0, 3 * ROW_S + 100.0)


def test_demand_overtakes_prefetches_after_the_chunk_under_way():
    clock, transfers = start()
    running, queued = transfers.submit(KEY, 0, demand=False), transfers.submit(KEY, 1, demand=False)
    clock.advance(0.5)
    demands = [transfers.submit(KEY, 2, demand=True), transfers.submit(KEY, 3, demand=True)]
    assert transfers.wait_any([running, *demands]) == demands[:1]
    assert times(demands[0]) == (0.5, CHUNK_S, CHUNK_S + ROW_S)
    assert look(running) == (TransferState.RUNNING, CHUNK)
    assert transfers.wait_any([running, queued]) == [running]
    assert times(demands[1]) == (0.5, CHUNK_S + ROW_S, CHUNK_S + 2 * ROW_S)
    assert times(running) == (0.0, 0.0, 3 * ROW_S)
    assert transfers.wait_any([queued]) == [queued] and times(queued) == (0.0, 3 * ROW_S, 4 * ROW_S)


def test_what_is_due_now_has_arrived_and_the_next_has_begun():
    """At one instant the link's events come first, then the calls in their order."""
    clock, transfers = start(row_bytes=CHUNK)
    prefetches = [transfers.submit(KEY, slot, demand=False) for slot in range(3)]
    clock.advance(CHUNK_S)
    demand = transfers.submit(KEY, 3, demand=True)
    assert [transfer.state.value for transfer in prefetches] == ["done", "running", "queued"]
    assert transfers.wait_any([demand]) == [demand] and times(demand) == (CHUNK_S, 2 * CHUNK_S, 3 * CHUNK_S)


@pytest.mark.parametrize(
    ("what", "seen"),
    [("state", TransferState.DONE), ("settled", True), ("moved_bytes", ROW), ("started_s", START_S + ROW_S), ("finished_s", START_S + 2 * ROW_S)],
)  # fmt: skip
def test_every_look_is_at_the_present(what, seen):
    clock, transfers = start()
    transfers.submit(KEY, 0, demand=True)
    second = transfers.submit(KEY, 1, demand=True)
    clock.advance(2 * ROW_S)
    assert getattr(second, what) == seen


@pytest.mark.parametrize("looked_at", [True, False])
def test_looking_changes_nothing(looked_at):
    """What is promoted, cancelled or closed after a while meets a link that has moved on meanwhile."""
    clock, transfers = start()
    first, second, third = (transfers.submit(KEY, slot, demand=False) for slot in range(3))
    acts = [
        lambda: transfers.promote(second),  # during the second chunk of the first
        lambda: transfers.promote(first),  # during the first chunk of the second
        lambda: transfers.cancel(second),  # during its second chunk
        transfers.close,  # during the first chunk of the third
    ]
    for act in acts:
        clock.advance(1.5)
        assert not looked_at or not third.settled
        act()
    assert times(second) == (0.0, 2 * CHUNK_S, 4 * CHUNK_S) and look(second) == (TransferState.CANCELLED, 2 * CHUNK)
    assert times(first) == (0.0, 0.0, 4 * CHUNK_S + 0.75) and look(first) == (TransferState.DONE, ROW)
    assert times(third) == (0.0, 4 * CHUNK_S + 0.75, 6.0) and look(third) == (TransferState.CANCELLED, CHUNK)


def test_promoted_prefetches_go_to_the_end_of_the_demands():
    clock, transfers = start()
    running, queued, last = (transfers.submit(KEY, slot, demand=False) for slot in range(3))
    transfers.promote(last)
    transfers.promote(running)
    transfers.promote(last)  # it keeps its place
    demand = transfers.submit(KEY, 3, demand=True)
    assert last.demand and running.demand and not queued.demand
    transfers.wait_any([queued])
    assert times(last) == (0.0, CHUNK_S, CHUNK_S + ROW_S)
    assert times(running) == (0.0, 0.0, 2 * ROW_S)
    assert times(demand) == (0.0, 2 * ROW_S, 3 * ROW_S)
    assert times(queued) == (0.0, 3 * ROW_S, 4 * ROW_S)


def test_promoted_on_its_last_chunk():
    clock, transfers = start()
    last_chunk = transfers.submit(KEY, 0, demand=False)
    clock.advance(3.0)
    transfers.promote(last_chunk)
    assert last_chunk.demand
    after = transfers.submit(KEY, 1, demand=True)
    transfers.wait_any([after])
    assert times(last_chunk) == (0.0, 0.0, ROW_S) and times(after) == (3.0, ROW_S, 2 * ROW_S)


def test_cancelled_prefetches():
    clock, transfers = start()
    running, queued, next_one = (transfers.submit(KEY, slot, demand=False) for slot in range(3))
    clock.advance(0.5)
    transfers.cancel(queued)
    assert look(queued) == (TransferState.CANCELLED, 0) and times(queued) == (0.0, -START_S, 0.5)
    transfers.cancel(running)
    transfers.cancel(running)
    transfers.promote(running)
    assert look(running) == (TransferState.RUNNING, 0)  # its chunk still writes into the slot
    assert transfers.queued_bytes == CHUNK + ROW
    assert transfers.wait_any([running]) == [running] and clock() == START_S + CHUNK_S
    assert look(running) == (TransferState.CANCELLED, CHUNK) and times(running) == (0.0, 0.0, CHUNK_S)
    transfers.wait_any([next_one])
    assert times(next_one) == (0.0, CHUNK_S, CHUNK_S + ROW_S)
    transfers.cancel(next_one)
    transfers.promote(next_one)
    assert next_one.state is TransferState.DONE and not next_one.demand


def test_cancelled_while_overtaken():
    """It has begun, but none of its chunks is on the link: it ends at once."""
    clock, transfers = start()
    overtaken, demand = transfers.submit(KEY, 0, demand=False), transfers.submit(KEY, 1, demand=True)
    clock.advance(2.0)
    assert look(overtaken) == (TransferState.RUNNING, CHUNK)
    transfers.cancel(overtaken)
    assert look(overtaken) == (TransferState.CANCELLED, CHUNK) and times(overtaken) == (0.0, 0.0, 2.0)
    assert transfers.wait_any([overtaken, demand]) == [overtaken] and clock() == START_S + 2.0
    assert transfers.wait_any([demand]) == [demand] and times(demand) == (0.0, CHUNK_S, CHUNK_S + ROW_S)


def test_cancelled_on_its_last_chunk():
    clock, transfers = start()
    late = transfers.submit(KEY, 0, demand=False)
    clock.advance(3.0)
    transfers.cancel(late)
    clock.advance(1.0)
    assert look(late) == (TransferState.CANCELLED, ROW) and times(late) == (0.0, 0.0, ROW_S)


def test_waiting_for_several_returns_all_that_have_settled_in_the_order_given():
    clock, transfers = start(row_bytes=CHUNK)
    first, second, third = (transfers.submit(KEY, slot, demand=True) for slot in range(3))
    assert transfers.wait_any([]) == []
    assert transfers.wait_any([third, second]) == [second] and clock() == START_S + 2 * CHUNK_S
    assert transfers.wait_any([third, second, first]) == [second, first] and clock() == START_S + 2 * CHUNK_S


def test_a_link_without_limit_delivers_at_once():
    clock, transfers = start(bytes_per_s=float("inf"), latency_s=0.0)
    both = [transfers.submit(KEY, slot, demand=True) for slot in range(2)]
    assert transfers.wait_any(both) == both and clock() == START_S


def test_waiting_for_what_never_settles_is_refused():
    clock, transfers = start()
    _, others = start()
    transfers.submit(KEY, 0, demand=True)
    with pytest.raises(ValueError, match="never settle"):
        transfers.wait_any([others.submit(KEY, 0, demand=True)])
    assert clock() == START_S


def test_closing_cancels_everything():
    clock, transfers = start()
    running, prefetch, promoted = (transfers.submit(KEY, slot, demand=False) for slot in range(3))
    demand = transfers.submit(KEY, 3, demand=True)
    transfers.promote(promoted)
    clock.advance(0.5)
    transfers.close()
    transfers.close()
    everything = [running, prefetch, promoted, demand]
    assert transfers.wait_any(everything) == everything and clock() == START_S + 0.5
    assert [look(transfer) for transfer in everything] == [
        (TransferState.CANCELLED, CHUNK),  # its chunk arrives at once, as over a link that is cut
        *[(TransferState.CANCELLED, 0)] * 3,
    ]
    assert {transfer.finished_s for transfer in everything} == {clock()} and transfers.queued_bytes == 0
    with pytest.raises(TransferError, match="layer 0 expert 0 .* closed"):
        transfers.submit(KEY, 0, demand=True)


@pytest.mark.parametrize(
    ("change", "option"),
    [
        *[({"bytes_per_s": wrong}, "machine.link.bytes_per_s") for wrong in (0, -1, float("nan"))],
        *[({"latency_s": wrong}, "machine.link.latency_s") for wrong in (-1, float("nan"), float("inf"))],
        *[({"chunk_bytes": wrong}, "machine.link.chunk_bytes") for wrong in (0, -CHUNK)],
        ({"row_bytes": 0}, "row_bytes"),
    ],
)
def test_impossible_links_are_refused(change, option):
    with pytest.raises(ConfigError, match=option):
        start(**change)


# ---- any program ----


@dataclass
class Act:
    """What a program does after `gap_s`: submit a transfer, or promote or cancel the one numbered `target`, modulo how many there are."""

    gap_s: float
    what: str
    target: int


GAPS_S = st.integers(0, 24).map(lambda eighths: eighths / 8)
ACTS = st.builds(Act, GAPS_S, st.sampled_from(["demand", "prefetch", "promote", "cancel"]), st.integers(0, 40))
PROGRAMS = st.lists(ACTS, min_size=1, max_size=40)


@dataclass
class Played:
    """A transfer of a program, how many demand loads were unsettled when it was submitted, and when it was cancelled."""

    transfer: Transfer
    n_demands_ahead: int
    cancelled_s: float | None = None


def play(clock: VirtualClock, transfers: VirtualTransfers, program: list[Act]) -> list[Played]:
    """Run `program`, then let everything settle."""
    played: list[Played] = []
    for act in program:
        clock.advance(act.gap_s)
        if act.what in ("demand", "prefetch"):
            ahead = sum(other.transfer.demand and not other.transfer.settled for other in played)
            played.append(Played(transfers.submit(KEY, len(played), demand=act.what == "demand"), ahead))
        elif played:
            target = played[act.target % len(played)]
            if act.what == "promote":
                transfers.promote(target.transfer)
            else:
                if target.cancelled_s is None and not target.transfer.settled:
                    target.cancelled_s = clock()
                transfers.cancel(target.transfer)
    clock.advance(1e6)
    assert transfers.queued_bytes == 0 and all(one.transfer.settled for one in played)
    return played


@given(PROGRAMS)
def test_whole_rows_move_unless_cancelled(program):
    clock, transfers = start()
    for one in play(clock, transfers, program):
        transfer = one.transfer
        assert transfer.moved_bytes in (0, CHUNK, 2 * CHUNK, ROW)
        assert (transfer.started_s > 0) == (transfer.moved_bytes > 0)
        assert not transfer.started_s or transfer.submitted_s <= transfer.started_s < transfer.finished_s
        if one.cancelled_s is None:
            assert transfer.state is TransferState.DONE and transfer.moved_bytes == ROW
        else:
            left_s = transfer.finished_s - one.cancelled_s
            assert transfer.state is TransferState.CANCELLED and 0 <= left_s <= CHUNK_S
            assert transfer.moved_bytes < ROW or 0 < left_s <= 0.75  # its last chunk was under way


@given(PROGRAMS)
def test_the_link_never_carries_two_chunks(program):
    """With rows of one chunk a transfer's time is its chunk's."""
    clock, transfers = start(row_bytes=CHUNK)
    begun = sorted((one.transfer.started_s, one.transfer) for one in play(clock, transfers, program) if one.transfer.started_s)
    assert all(transfer.finished_s == start_s + CHUNK_S for start_s, transfer in begun)
    assert all(before.finished_s <= start_s for (_, before), (start_s, _) in pairwise(begun))


@given(PROGRAMS)
def test_a_demand_load_waits_for_one_chunk_and_the_demand_loads_ahead(program):
    clock, transfers = start()
    was_demand = [act.what == "demand" for act in program if act.what in ("demand", "prefetch")]
    for demand, one in zip(was_demand, play(clock, transfers, program), strict=True):
        if demand and one.transfer.started_s:
            longest_s = CHUNK_S + one.n_demands_ahead * ROW_S
            assert one.transfer.started_s - one.transfer.submitted_s <= longest_s


@given(PROGRAMS)
def test_first_in_first_out(program):
    """Among those that were demand loads from the start, and among those that never were."""
    clock, transfers = start()
    was_demand = [act.what == "demand" for act in program if act.what in ("demand", "prefetch")]
    played = [one.transfer for one in play(clock, transfers, program)]
    for kind in (True, False):
        started = [
            transfer.started_s
            for demand, transfer in zip(was_demand, played, strict=True)
            if demand is transfer.demand is kind and transfer.started_s
        ]
        assert started == sorted(started)


@given(
    gaps_s=st.lists(st.floats(0, 10), min_size=1, max_size=20),
    row_bytes=st.integers(1, 10**7),
    bytes_per_s=st.floats(1e6, 1e11),
    latency_s=st.floats(0, 1e-3),
)
def test_times_are_those_an_emulated_link_reserves(gaps_s, row_bytes, bytes_per_s, latency_s):
    """To the last bit, whatever is rounded."""
    clock, link = VirtualClock(), EmulatedLink(bytes_per_s, latency_s)
    chunk_bytes = 1 << 20
    transfers = VirtualTransfers(
        clock, row_bytes=row_bytes, bytes_per_s=bytes_per_s, latency_s=latency_s, chunk_bytes=chunk_bytes
    )
    queued, due_s = [], []
    for gap_s in gaps_s:
        clock.advance(gap_s)
        queued.append(transfers.submit(KEY, 0, demand=True))
        for begin in range(0, row_bytes, chunk_bytes):
            due = link.reserve(min(chunk_bytes, row_bytes - begin), clock())
        due_s.append(due)
    transfers.wait_any(queued[-1:])
    assert [transfer.finished_s for transfer in queued] == due_s
