"""The emulated link: its schedule by exact arithmetic, its sleeping by what must hold on any machine."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefetch.errors import ConfigError
from prefetch.transfers.link import EmulatedLink


def test_requests_queue_up_behind_each_other():
    link = EmulatedLink(bytes_per_s=1000, latency_s=0.5)
    assert link.reserve(1000, ready_s=10.0) == 11.5
    assert link.reserve(2000, ready_s=10.2) == 14.0  # starts at 11.5
    assert link.reserve(0, ready_s=20.0) == 20.5  # the link was idle from 14.0 on


@given(
    ready_s=st.lists(st.integers(0, 50), min_size=1, max_size=30).map(sorted),
    n_bytes=st.integers(1, 1 << 20),
    latency_s=st.sampled_from([0.0, 0.25, 2.0]),
)
def test_schedule_is_that_of_a_serial_server(ready_s, n_bytes, latency_s):
    """Delivery n comes at the latest, over i <= n, of: ready_i + the work of requests i..n."""
    link = EmulatedLink(bytes_per_s=1 << 18, latency_s=latency_s)
    dues = [link.reserve(n_bytes, ready) for ready in ready_s]
    each_s = latency_s + n_bytes / (1 << 18)
    for n, due in enumerate(dues, start=1):
        assert due == pytest.approx(max(ready + (n - i) * each_s for i, ready in enumerate(ready_s[:n])))
    assert link.busy_until_s == dues[-1]


def test_oversleeping_does_not_add_up():
    """A request that was ready in time starts where the schedule says, however late its thread comes for it."""
    link = EmulatedLink(bytes_per_s=1e6, latency_s=0.0)
    began_s = time.perf_counter()
    for n in range(1, 21):
        due_s = link.reserve(1000, ready_s=began_s)
        assert due_s == pytest.approx(began_s + n * 1e-3)
        link.deliver(due_s)
        time.sleep(0.0005)  # a thread that dawdles
    assert time.perf_counter() >= due_s
    assert link.n_requests == 20


def test_delivery_is_never_early_and_lateness_is_counted():
    link = EmulatedLink(bytes_per_s=1e9, latency_s=0.0)
    due_s = time.perf_counter() + 0.003
    link.deliver(due_s)
    assert time.perf_counter() >= due_s
    before_s = link.lateness_s
    link.deliver(time.perf_counter() - 1.0)  # the copy itself took a second too long
    assert link.lateness_s - before_s >= 1.0
    assert link.n_requests == 2


def test_a_cut_link_delivers_at_once():
    link = EmulatedLink(bytes_per_s=1.0, latency_s=0.0)
    due_s = link.reserve(10**9, ready_s=time.perf_counter())
    link.cut()
    link.deliver(due_s)
    assert time.perf_counter() < due_s


@pytest.mark.parametrize(
    ("bytes_per_s", "latency_s", "option"),
    [(0, 0, "bytes_per_s"), (-1, 0, "bytes_per_s"), (float("nan"), 0, "bytes_per_s"), (1, -1, "latency_s")],
)
def test_impossible_links_are_refused(bytes_per_s, latency_s, option):
    with pytest.raises(ConfigError, match=option):
        EmulatedLink(bytes_per_s, latency_s)
