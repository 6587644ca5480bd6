"""An emulated link: real copies, paced to arrive when a link of the given bandwidth and latency would deliver them."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int32, c_int64

from prefetch.errors import ConfigError
from prefetch.transfers.native import library


class EmulatedLink(ctypes.Structure):
    """A serial link with an absolute schedule (`emulated_link` of pool.c).

    Each request occupies the link for `latency_s + n_bytes / bytes_per_s`, from the moment it was ready or the link got
    free, whichever is later, by the schedule and not by when a sleeping thread woke up: oversleeping does not add up.
    It cannot be faster than the copies beneath it: `lateness_s` tells by how much they missed the schedule.

    Attributes:
        busy_until_s: `time.perf_counter()` seconds at which the link delivers the last byte reserved so far.
        n_requests: requests delivered.
        lateness_s: by how much they were delivered after their scheduled time, summed. The emulation holds where
            `lateness_s / n_requests` is small beside the time of one request.
    """

    _fields_ = (
        ("bytes_per_s", c_double),
        ("latency_s", c_double),
        ("busy_until_s", c_double),
        ("lateness_s", c_double),
        ("n_requests", c_int64),
        ("_taken", c_int32),
        ("_cut", c_int32),
    )

    def __init__(self, bytes_per_s: float, latency_s: float):
        if not bytes_per_s > 0:
            raise ConfigError(f"tier.link.bytes_per_s is {bytes_per_s}; a bandwidth above 0 is right")
        if not latency_s >= 0:
            raise ConfigError(f"tier.link.latency_s is {latency_s}; 0 or more seconds are right")
        super().__init__(bytes_per_s=bytes_per_s, latency_s=latency_s, busy_until_s=float("-inf"))

    def reserve(self, n_bytes: int, ready_s: float) -> float:
        """Put a request that has been ready since `ready_s` on the link; returns when its last byte is due."""
        return library().link_reserve(ctypes.addressof(self), n_bytes, ready_s)

    def deliver(self, due_s: float) -> None:
        """Block until `due_s`, the time `reserve` gave; returns at once if it has passed or the link has been cut."""
        library().link_deliver(ctypes.addressof(self), due_s)

    def cut(self) -> None:
        """Deliver everything at once from now on: the run is over and nobody should wait for a slow link."""
        self._cut = True
