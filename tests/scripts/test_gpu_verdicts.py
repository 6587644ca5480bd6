"""What is said of numbers: met and missed only where the targets were set, shares, and which kernel is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.gpu.targets import TARGETS
from scripts.gpu.verdicts import judge, wrong


def time(provider: str, us: float | None, n_tokens: int = 1, **changes: Any) -> dict[str, Any]:
    timing = None if us is None else {"first_us": us + 1, "second_us": us, "captured": True, "n_replays": 9}
    return {
        "operation": "experts", "shape": "Qwen3-30B-A3B", "n_tokens": n_tokens, "provider": provider, "timing": timing,
        "touched_bytes": 75e6, "roof_us": 18.0, "share_of_roof": 0.9, "skipped": None, "error": 2e-3, "tolerance": 2e-2, "right": True,
        "ours_us": None,
    } | changes  # fmt: skip


def arm(driven_by: str, name: str, tokens_per_s: float | None) -> dict[str, Any]:
    return {"driven_by": driven_by, "arm": name, "tokens_per_s": tokens_per_s}


def found(device: str = "NVIDIA H200", **sections: list[dict[str, Any]]) -> dict[str, Any]:
    of = {name.replace("_", " "): {"rows": rows, "stopped": None} for name, rows in sections.items()}
    return {"device": {"name": device}, "sections": of, "skipped": {}}


COPY = [{"bytes_per_s": 2.15e12}]


def test_a_target_is_met_or_missed_only_on_the_device_that_it_was_set_for() -> None:
    own = judge(found(kernels_q=[time("ours", 20.0)], copy_rate=COPY))["verdicts"]["targets"]
    assert len(own) == len(TARGETS) and own[0] | {"us": 20.0, "met": True, "scaled_us": None, "met_scaled": None} == own[0]
    assert own[1]["us"] is None and own[1]["met"] is None
    other = judge(found("NVIDIA H100", kernels_q=[time("ours", 40.0)], copy_rate=COPY))["verdicts"]["targets"]
    assert other[0]["met"] is None and other[0]["scaled_us"] == 44.0 and other[0]["met_scaled"] is True
    unscaled = judge(found("NVIDIA H100", kernels_q=[time("ours", 40.0)]))["verdicts"]["targets"][0]
    assert (unscaled["met"], unscaled["scaled_us"], unscaled["met_scaled"]) == (None, None, None)


def test_times_have_their_share_of_the_copy_rate() -> None:
    judged = judge(found(kernels_q=[time("ours", 50.0), time("torch_loop", None)], copy_rate=COPY))
    rows = judged["sections"]["kernels q"]["rows"]
    assert rows[0]["share_of_copy"] == pytest.approx(75e6 / 50e-6 / 2.15e12) and rows[1]["share_of_copy"] is None
    assert judged["verdicts"]["targets"][0]["share_of_copy"] == rows[0]["share_of_copy"]


def test_few_tokens_must_be_ahead_and_many_not_far_behind() -> None:
    ours = [time(p, us, n) for n in (16, 64) for p, us in (("ours", 90.0), ("ours_grouped", 1.0))]
    times = ours + [
        time("torch_loop", 100.0, n, ours_us=105.0) for n in (16, 64)
    ]  # in turn with that peer, not as it was before
    few, many = judge(found(kernels_q=[*times, time("read_only", 1.0, 64)]))["verdicts"]["peers"]
    assert (few["best_peer"], few["us"], few["allowed"], few["met"]) == ("torch_loop", 105.0, 1.0, False)
    assert (many["best_peer"], many["allowed"], many["met"]) == ("torch_loop", 1.1, True)


def test_a_gain_stands_beside_its_bound() -> None:
    arms = [arm("host", "slru", 10.0), arm("host", "lru", 11.0), arm("host", "gate_reuse", 12.0), arm("host", "oracle", 12.5)]
    section = [{"setting": {}}, *arms, arm("device", "slru", None), arm("nobody", "resident", 40.0)]
    (verdict,) = judge(found(decode_q=section))["verdicts"]["decode"]
    assert verdict["gate_reuse_over_slru"] == 1.2 and verdict["oracle_over_slru"] == 1.25 and verdict["lru_over_slru"] == 1.1
    assert not verdict["met"] and not verdict["oracle_allows_it"]


def test_only_the_copy_engine_is_held_to_its_target() -> None:
    rates = [{"way": "copy engine, queued", "bytes_per_s": 50e9}, {"way": "copy by a kernel", "bytes_per_s": 60e9}]
    assert judge(found(transfers=rates))["verdicts"]["copy_engine"] == {"bytes_per_s": 50e9, "target": 52e9, "met": False}
    assert judge(found())["verdicts"]["copy_engine"] is None


def test_a_wrong_kernel_of_ours_is_told_and_a_wrong_peer_is_not() -> None:
    small = {"shape": "odd", "n_tokens": 1, "dtype": "float32", "tolerance": 1e-4, "problem": None}
    checks = [
        small | {"provider": "ours", "ours": True, "passed": False, "error": 0.5},
        small | {"provider": "torch_loop", "ours": False, "passed": False, "error": 0.5},
        small | {"provider": "router", "ours": True, "passed": False, "error": None, "problem": "no room"},
    ]
    bad = {"right": False, "error": 0.03}
    times = [time("ours_grouped", 9.0, **bad), time("torch_loop", 9.0, **bad), time("ours", 9.0, right=False, error=None)]
    tokens = [{"predictor": "none", "explained_by_rounding": False, "n_equal": 3, "n_tokens": 8}]
    told = wrong(found(correctness_x=checks, kernels_q=times))
    assert [sentence.split(":")[-1].strip() for sentence in told] == [
        "error 5.0e-01 > 1e-04", "no room", "error 3.0e-02 > 2e-02 where it was timed", "error not a number > 2e-02 where it was timed",
    ]  # fmt: skip
    apart = found()
    apart["sections"]["tokens device-driven"] = {"rows": tokens, "stopped": None}
    assert wrong(apart) == ["tokens of the bundled model, predictor none: 3 of 8"]
