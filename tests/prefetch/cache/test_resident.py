"""Keeping everything: only first touches miss."""

from __future__ import annotations

import random

import pytest

from prefetch.cache.replay import replay_hits
from prefetch.cache.resident import Resident
from prefetch.errors import CapacityError
from prefetch.geometry import ExpertKey


def test_only_first_touches_miss() -> None:
    draw = random.Random(0)
    events = [[ExpertKey(index % 4, expert) for expert in draw.sample(range(8), 3)] for index in range(400)]
    counts = replay_hits(Resident(4 * 8), events)
    assert counts.misses == len({key for event in events for key in event})


def test_too_small_is_an_error_that_names_the_way_out() -> None:
    cache = Resident(1)
    cache.insert(ExpertKey(0, 0))
    with pytest.raises(CapacityError, match=r"cache=resident .* all 1 of its slots are taken .* \(cache.slots=1.0\)"):
        cache.insert(ExpertKey(0, 1))
