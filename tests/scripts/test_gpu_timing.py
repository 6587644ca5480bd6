"""How often a call is timed: as its budget allows, in graphs of about a millisecond; what fails in
one round is not timed in the next, and a failing second round leaves the first."""

from __future__ import annotations

import pytest
import torch

from scripts.gpu import timing
from scripts.gpu.kernel_times import Timed, times_beside_roof
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
        if calls[0] == "broken" or order.count(calls[0]) > 1 and calls[0] == "once":
            raise RuntimeError("not on this card\nand more")
        return Round(10.0 + len(order), True, 7)

    monkeypatch.setattr(timing, "time_round", time_round)
    monkeypatch.setattr(timing, "spin", lambda: None)
    found = dict(time_in_turn({name: [name] for name in ("ours", "broken", "peer", "once")}))  # type: ignore[dict-item]
    assert order == ["ours", "broken", "peer", "once", "ours", "peer", "once"]
    assert found == {
        "ours": Timing(11.0, 15.0, True, 7),
        "broken": "RuntimeError: not on this card",
        "peer": Timing(13.0, 16.0, True, 7),
        "once": Timing(14.0, None, True, 7, "RuntimeError: not on this card"),
    }


def test_what_breaks_the_process_does_not_take_our_times_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> torch.Tensor:
        raise SystemExit("as good as a crash")

    exact, about = torch.ones(2), Timed("experts", "a model", 1, 8.0)
    providers = {"peer": [breaks], "ours": [lambda: exact], "ours_wrong": [lambda: 2 * exact]}
    monkeypatch.setattr(timing, "time_round", lambda calls: Round(10.0, True, 7))
    monkeypatch.setattr(timing, "spin", lambda: None)
    times = times_beside_roof(about, [lambda: torch.zeros(3)], providers, exact, 1e-3)
    found = [next(times) for _ in range(3)]
    assert [(t.provider, t.error, t.right, t.share_of_roof) for t in found] == [
        ("read_only", None, None, 1.0), ("ours", 0.0, True, 1.0), ("ours_wrong", 1.0, False, 1.0)
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        next(times)


def test_a_peer_stands_beside_ours_as_it_was_in_turn_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, about = torch.ones(2), Timed("experts", "a model", 1, 8.0)
    clock = iter(range(10, 100))
    monkeypatch.setattr(timing, "time_round", lambda calls: Round(float(next(clock)), True, 7))
    monkeypatch.setattr(timing, "spin", lambda: None)
    providers = {"ours": [lambda: exact], "ours_decode": [lambda: exact], "peer": [lambda: exact], "unable": [lambda: 1 / 0]}
    times = list(times_beside_roof(about, [], providers, exact, 1e-3))
    assert [(t.provider, t.timing and t.timing.us, t.ours_us) for t in times] == [
        ("ours", 10.0, None), ("ours_decode", 11.0, None), ("peer", 15.0, 14.0), ("unable", None, 14.0)
    ]  # fmt: skip
