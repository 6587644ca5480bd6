"""The launchers' integer arithmetic against Triton's own."""

from __future__ import annotations

import triton

from kernels.integers import cdiv, next_power_of_2


def test_they_are_tritons() -> None:
    for n in range(1, 3000):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [cdiv(n, by) for by in (1, 2, 7, 16)] == [triton.cdiv(n, by) for by in (1, 2, 7, 16)]
