"""An emulated link: real copies, paced to arrive when a link of the given bandwidth and latency would deliver them."""

from __future__ import annotations

import ctypes
import sys
import threading
import time

from prefetch.errors import ConfigError

SPIN_S = 20e-6  # about what a precise sleep overshoots; short enough to hold the GIL
SLICE_S = 0.05  # how long a delivery may take to notice that the link was cut
PR_SET_TIMERSLACK = 29  # <linux/prctl.h>


class EmulatedLink:
    """A serial link with an absolute schedule.

    Each request occupies the link for `latency_s + n_bytes / bytes_per_s`, from the moment it was ready or the link got
    free, whichever is later, by the schedule and not by when a sleeping thread woke up: oversleeping does not add up.
    It cannot be faster than the copies beneath it: `lateness_s` tells by how much they missed the schedule.

    Attributes:
        busy_until_s: `time.perf_counter()` seconds at which the link delivers the last byte reserved so far.
        n_requests: requests delivered.
        lateness_s: by how much they were delivered after their scheduled time, summed. The emulation holds where
            `lateness_s / n_requests` is small beside the time of one request.
    """

    def __init__(self, bytes_per_s: float, latency_s: float):
        if not bytes_per_s > 0:
            raise ConfigError(f"tier.link.bytes_per_s is {bytes_per_s}; a bandwidth above 0 is right")
        if not latency_s >= 0:
            raise ConfigError(f"tier.link.latency_s is {latency_s}; 0 or more seconds are right")
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.busy_until_s = float("-inf")
        self.n_requests = 0
        self.lateness_s = 0.0
        self._cut = False

    def reserve(self, n_bytes: int, ready_s: float) -> float:
        """Put a request that has been ready since `ready_s` on the link; returns when its last byte is due."""
        self.busy_until_s = max(ready_s, self.busy_until_s) + self.latency_s + n_bytes / self.bytes_per_s
        return self.busy_until_s

    def deliver(self, due_s: float) -> None:
        """Block until `due_s`, the time `reserve` gave; returns at once if it has passed."""
        while not self._cut and (now_s := time.perf_counter()) < due_s:
            sleep_until(min(due_s, now_s + SLICE_S))
        self.n_requests += 1
        self.lateness_s += max(0.0, time.perf_counter() - due_s)

    def cut(self) -> None:
        """Deliver everything at once from now on: the run is over and nobody should wait for a slow link."""
        self._cut = True


def sleep_until(deadline_s: float) -> None:
    """Return at `deadline_s` of `time.perf_counter()`, as a rule a few microseconds late."""
    remaining_s = deadline_s - time.perf_counter()
    if remaining_s > SPIN_S:
        _refuse_timer_slack()
        time.sleep(remaining_s - SPIN_S)
    while time.perf_counter() < deadline_s:
        pass


_thread = threading.local()


def _refuse_timer_slack() -> None:
    """Linux lets a thread's timers fire 50 us late to save wake-ups; ask for 1 ns instead, once per thread."""
    if not hasattr(_thread, "precise"):
        _thread.precise = sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0) == 0
