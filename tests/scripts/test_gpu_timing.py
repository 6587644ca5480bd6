"""How often a call is timed: as its budget allows, in graphs of about a millisecond; what fails in one round is not timed in the next."""

from __future__ import annotations

import pytest

from scripts.gpu import timing
from scripts.gpu.timing import Round, Timing, n_replays_for, n_rounds_for, time_in_turn


def test_a_slow_call_is_repeated_less() -> None:
    assert [n_replays_for(seconds) for seconds in (1e-4, 4e-3, 1.0)] == [100, 50, 5]


def test_a_graph_holds_a_millisecond_of_work_and_not_too_many_calls() -> None:
    assert n_rounds_for(4, 80e-6) == 13 and n_rounds_for(4, 2e-3) == 1
    assert n_rounds_for(300, 1e-6) == 1 and n_rounds_for(4, 1e-6) == 125


def test_providers_take_turns_and_a_failing_one_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def time_round(calls: list[str]) -> Round:
        order.append(calls[0])
        if calls[0] == "broken":
            raise RuntimeError("not on this card\nand more")
        return Round(10.0 + len(order), True, 7)

    monkeypatch.setattr(timing, "time_round", time_round)
    monkeypatch.setattr(timing, "spin", lambda: None)
    found = dict(time_in_turn({name: [name] for name in ("ours", "broken", "peer")}))  # type: ignore[dict-item]
    assert order == ["ours", "broken", "peer", "ours", "peer"]
    assert found == {
        "ours": Timing(11.0, 14.0, True, 7),
        "broken": "RuntimeError: not on this card",
        "peer": Timing(13.0, 15.0, True, 7),
    }
