"""The GPU check's tables: what was measured, what was not, and a page that says which."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from prefetch.errors import ResultsError
from scripts.gpu.kernel_times import KernelTime
from scripts.gpu.offloaded_decode import ArmSpeed
from scripts.gpu.tables import section_table
from scripts.gpu.targets import TARGETS
from scripts.gpu.timing import Timing
from scripts.gpu.transfers import TransferRate
from scripts.gpu.verdicts import judge
from scripts.gpu_tables import PAGE, markdown, read_all


def device(name: str = "NVIDIA H200") -> dict:
    times = [
        KernelTime("Qwen3-30B-A3B", 1, "ours", Timing(21.0, 20.0, True, 50), 75e6, 18.0, error=2e-3),
        KernelTime("Qwen3-30B-A3B", 1, "torch_loop", Timing(90.0, 80.0, False, 50), 75e6, 18.0, ours_us=20.0),
        KernelTime("Qwen3-30B-A3B", 1, "ours", Timing(5.0, 4.0, True, 50), 1e6, None, None, "router"),
        KernelTime("Qwen3-30B-A3B", 8, "ours", None, 75e6, 18.0, "no room"),
    ]
    arms = [
        ArmSpeed("Qwen3-30B-A3B", "int4 per 64", "device", "slru", "slru", 900, 30.0, 29.0, 31.0, 0.8, 2e8, None, 2, True),
        ArmSpeed(
            "Qwen3-30B-A3B", "int4 per 64", "device", "gate_reuse", "lru", 900, 45.0, 44.0, 46.0, 0.9, 3e8, 0.002, 2, False
        ),
        ArmSpeed("Qwen3-30B-A3B", "int4 per 64", "nobody", "resident", "none", 6144, skipped="all experts take 58 GB"),
    ]
    rates = [
        TransferRate("OLMoE", "copy engine, queued", 12_600_000, 8, 50e9),
        TransferRate("OLMoE", "copy by a kernel", 12_600_000, 8, 40e9),
    ]
    rows = {
        "copy rate": [{"copied_bytes": 1, "bytes_per_s": 4e12}],
        "correctness experts": [
            {"provider": "ours", "dtype": "float32", "passed": True, "error": 1e-7, "problem": None},
            {"provider": "ours", "dtype": "float16", "passed": False, "error": None, "problem": "no room"},
        ],
        "kernels Qwen3-30B-A3B T=1": [asdict(t) | {"share_of_roof": t.share_of_roof} for t in times],
        "decode Qwen3-30B-A3B int4": [{"setting": {}}, *(asdict(arm) for arm in arms)],
        "transfers": [asdict(rate) for rate in rates],
    }
    found = {
        "device": {
            "name": name, "memory_bytes": 141e9, "multiprocessors": 132, "cuda": "13.0", "ptxas": "12.8",
            "reported": {"driver_version": "580"}, "provenance": {"versions": {"torch": "2.11", "triton": "3.6"}},
        },
        "sections": {section: {"rows": found, "stopped": None} for section, found in rows.items()},
        "skipped": {"tokens host-driven": "out of time"},
    }  # fmt: skip
    found["sections"]["transfers"]["stopped"] = "ended by SIGKILL"
    return json.loads(json.dumps(judge(found)))


def test_what_was_measured_stands_beside_its_target() -> None:
    text = markdown([device()])
    assert "| experts | Qwen3-30B-A3B | 1 | 22 | 20.0 (met) | 90% | 94% |" in text
    assert "| router | Qwen3-30B-A3B | 1 | 3 | 4.0 (missed) |  | 6% |" in text
    assert "| experts | Qwen3-30B-A3B | 8 | 140 | not measured |  |  |" in text
    assert "1 of 2 checks" in text
    assert "Incomplete: transfers (ended by SIGKILL); tokens host-driven (out of time)." in text
    assert "| Qwen3-30B-A3B | 1 | 20.0 | torch_loop (eager) | 80.0 | 1.00 x | met |" in text
    assert "| slru | slru | device | 900 | 30.0 [29.0, 31.0] | 80% | 200 | not measured |" in text
    assert "| gate_reuse | lru | device | 900 | 45.0 [44.0, 46.0] OTHER LOGITS | 90% | 300 | 2.00 |" in text
    assert "| resident | none | nobody | 6144 | not measured: all experts take 58 GB |" in text
    assert "| Qwen3-30B-A3B int4 | device |  | 1.50 x |  | 1.30 x | met |" in text
    assert "| OLMoE | 12.60 | copy by a kernel | 40.0 | 80% |" in text
    assert "Copy engine at best 50.0 GB/s; target 52: missed." in text


def test_another_device_is_not_held_to_the_targets() -> None:
    text = markdown([device("NVIDIA H100")])
    assert "| experts | Qwen3-30B-A3B | 1 | 22 | 23.6 | 20.0 (below) | 90% | 94% |" in text
    assert "(met)" not in text and "(missed)" not in text


def test_every_section_can_be_shown_while_it_grows() -> None:
    found = device()
    for name, section in found["sections"].items():
        assert section_table(name, section["rows"])
    assert section_table("decode x", [{"setting": {}}]) == "no arm came to its end"
    assert "| ours | 1 of 2 | 1e-07 | - | no room |" in section_table(
        "correctness experts", found["sections"]["correctness experts"]["rows"]
    )


def test_a_time_of_one_round_is_shown_and_says_why_there_is_no_second() -> None:
    found = device()
    timing = found["sections"]["kernels Qwen3-30B-A3B T=1"]["rows"][0]["timing"]
    timing |= {"second_us": None, "no_second": "OutOfMemoryError: no room"}
    judged = json.loads(json.dumps(judge(found)))
    rows = judged["sections"]["kernels Qwen3-30B-A3B T=1"]["rows"]
    assert "| ours | 21.0, not measured: OutOfMemoryError: no room | 90% |" in section_table("kernels Qwen3-30B-A3B T=1", rows)
    assert judged["verdicts"]["targets"][0]["us"] == 21.0


def test_without_a_device_every_target_is_not_measured() -> None:
    text = markdown([])
    assert text.startswith("No GPU has been at hand: not measured.")
    assert text.count("| not measured |") == len(TARGETS)


def test_the_page_has_what_the_repository_holds() -> None:
    assert markdown(read_all(PAGE.parent / "results" / "gpu")) in PAGE.read_text()


@pytest.mark.parametrize("text", ['{"device": ', '{"device": {}}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ResultsError, match=r"card\.json: not a GPU check's result"):
        read_all(tmp_path)
