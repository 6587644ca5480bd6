"""A clock that stands still until it is told otherwise: the time of a replay."""

from __future__ import annotations

from math import inf

START_S = 1.0  # in transfer times 0.0 means "not known", so no clock may show it


class VirtualClock:
    """Called like `time.perf_counter`, it gives the present in seconds; only `advance` and `advance_to` move it."""

    __slots__ = ("_now_s",)

    def __init__(self) -> None:
        self._now_s = START_S

    def __call__(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass.

        Raises:
            ValueError: they are negative or not finite.
        """
        if not 0 <= seconds < inf:
            raise ValueError(f"a clock cannot advance by {seconds} s; 0 or more seconds are right")
        self._now_s += seconds

    def advance_to(self, time_s: float) -> None:
        """Let time pass until `time_s`.

        Raises:
            ValueError: `time_s` is in the past or not finite.
        """
        if not self._now_s <= time_s < inf:
            raise ValueError(f"a clock at {self._now_s} s cannot advance to {time_s} s; that time or a later one is right")
        self._now_s = time_s
