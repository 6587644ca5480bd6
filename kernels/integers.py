"""Integer arithmetic of launchers, on the host: Triton's own of the same names take 2 us a call, a router's launch a dozen of them."""

from __future__ import annotations


def cdiv(numerator: int, denominator: int) -> int:
    """Their ratio, rounded up; both above 0."""
    return -(-numerator // denominator)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least `n` >= 1."""
    return 1 << (n - 1).bit_length()
