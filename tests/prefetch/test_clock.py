"""The replay's clock."""

import pytest

from prefetch.clock import START_S, VirtualClock


def test_only_advancing_moves_the_clock():
    clock = VirtualClock()
    assert clock() == clock() == START_S > 0.0
    clock.advance(0.5)
    clock.advance(0.0)
    assert clock() == START_S + 0.5
    clock.advance_to(10.25)
    clock.advance_to(10.25)
    assert clock() == 10.25


@pytest.mark.parametrize("seconds", [-1e-300, -1.0, float("nan"), float("inf")])
def test_time_never_goes_back(seconds):
    clock = VirtualClock()
    with pytest.raises(ValueError, match="cannot advance by"):
        clock.advance(seconds)
    assert clock() == START_S


@pytest.mark.parametrize("time_s", [START_S - 2**-40, -1.0, float("nan"), float("inf")])
def test_a_past_time_is_refused(time_s):
    clock = VirtualClock()
    with pytest.raises(ValueError, match="cannot advance to"):
        clock.advance_to(time_s)
    assert clock() == START_S
