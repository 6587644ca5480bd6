"""The GPU check's tables: what was measured, what was not, and a page that says which."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from prefetch.errors import ResultsError
from scripts.gpu.kernel_times import KernelTime
from scripts.gpu.offloaded_decode import ArmSpeed
from scripts.gpu.timing import Timing
from scripts.gpu.transfers import TransferRate
from scripts.gpu_check import TARGETS
from scripts.gpu_tables import PAGE, markdown, read


def device() -> dict:
    times = [
        KernelTime("Qwen3-30B-A3B", 1, "ours", Timing(21.0, 20.0, True), 75e6, 18.0),
        KernelTime("Qwen3-30B-A3B", 1, "ours", Timing(5.0, 4.0, True), 1e6, None, None, "router"),
        KernelTime("Qwen3-30B-A3B", 8, "ours", None, 75e6, 18.0, "out of time"),
    ]
    arms = [
        ArmSpeed("Qwen3-30B-A3B", "int4 per 64", "device", "slru", 900, 30.0, 29.0, 31.0, 0.8, 2e8, None),
        ArmSpeed("Qwen3-30B-A3B", "int4 per 64", "nobody", "resident", 6144, skipped="all experts take 58 GB"),
    ]
    rates = [
        TransferRate("OLMoE", "copy engine", 12_600_000, 8, 50e9),
        TransferRate("OLMoE", "copy by a kernel", 12_600_000, 8, 40e9),
    ]
    found = {
        "device": "A card", "memory_bytes": 12e9, "provenance": {"versions": {"torch": "2.11", "triton": "3.6"}}, "skipped": {"tokens": "out of time"},
        "correctness": [{"passed": True}, {"passed": False}],
        "kernels Qwen3-30B-A3B": {"times": [asdict(t) | {"share_of_roof": t.share_of_roof} for t in times]},
        "decode Qwen3-30B-A3B int4": {"arms": [asdict(arm) for arm in arms]},
        "transfers": [asdict(rate) for rate in rates],
    }  # fmt: skip
    return json.loads(json.dumps(found))


def test_what_was_measured_stands_beside_its_target() -> None:
    text = markdown([device()])
    assert "| experts | Qwen3-30B-A3B | 1 | 22 | 20.0 (met) | 90% |" in text
    assert "| router | Qwen3-30B-A3B | 1 | 3 | 4.0 (missed) |  |" in text
    assert "| experts | Qwen3-30B-A3B | 8 | 140 | not measured |  |" in text
    assert "1 of 2 checks" in text and "Skipped: tokens (out of time)." in text
    assert "| slru | device | 900 | 30.0 [29.0, 31.0] | 80% | 200 | not measured |" in text
    assert "| resident | nobody | 6144 | not measured: all experts take 58 GB |" in text
    assert "| OLMoE | 12.60 | copy by a kernel | 40.0 | 80% |" in text
    assert "Copy engine at best 50.0 GB/s; target 52: missed." in text


def test_without_a_device_every_target_is_not_measured() -> None:
    text = markdown([])
    assert text.startswith("No GPU has been at hand: not measured.")
    assert text.count("| not measured |") == len(TARGETS)


def test_the_page_has_what_the_repository_holds(tmp_path: Path) -> None:
    folder = PAGE.parent / "results" / "gpu"
    assert markdown(read(folder)) in PAGE.read_text()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text('{"device": ')
    with pytest.raises(ResultsError, match=r"card\.json: not a GPU check's result"):
        read(tmp_path)
