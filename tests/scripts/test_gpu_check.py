"""The GPU check without a GPU: its peers and our kernels agree in the interpreter, and it says what it cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from predictors.gate_reuse import GateReuse
from scripts.gpu.bundled_tokens import HOST_DRIVEN, device_driven, host_driven
from scripts.gpu.correctness import SMALL, verdicts
from scripts.gpu.kernel_times import KernelTime
from scripts.gpu.operation_times import operation_verdicts
from scripts.gpu.operations import operations
from scripts.gpu.providers import PROVIDERS
from scripts.gpu.shapes import SHAPES, MoEShape
from scripts.gpu.timing import Timing
from scripts.gpu_check import TARGETS, Section, run_sections, targets
from tests.kernels.interpreter_bf16 import repair

REPOSITORY = Path(__file__).parents[2]
TINY = MoEShape("tiny", hidden=128, n_experts=8, top_k=2, intermediate=64, n_layers=2)


def test_all_peers_and_our_kernels_compute_the_same() -> None:
    repair()
    found = verdicts("cpu", SMALL[2:], (1, 5))
    assert {v.provider for v in found} == set(PROVIDERS) and {v.dtype for v in found} == {"float32", "float16", "bfloat16"}
    assert all(v.passed for v in found), [v for v in found if not v.passed]


def test_a_wrong_or_failing_provider_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(problem: object) -> torch.Tensor:
        raise RuntimeError("not on this card\nand more")

    monkeypatch.setitem(PROVIDERS, "torch_loop", lambda p: torch.zeros_like(p.x))
    monkeypatch.setitem(PROVIDERS, "ours", fails)
    found = {v.provider: v for v in verdicts("cpu", SMALL[2:], (1,)) if v.dtype == "float32"}
    assert not found["torch_loop"].passed and found["torch_loop"].error == pytest.approx(1.0)
    assert not found["ours"].passed and found["ours"].problem == "RuntimeError: not on this card"


def test_shapes_are_those_of_the_models() -> None:
    mb = {shape.name: shape.geometry(torch.bfloat16).row_bytes / 1e6 for shape in SHAPES}
    assert mb["Qwen3-30B-A3B"] == pytest.approx(9.44, abs=0.01) and mb["Mixtral-8x7B"] == pytest.approx(352.3, abs=0.1)
    assert mb["Qwen3.6-35B-A3B"] == pytest.approx(6.29, abs=0.01) and mb["DeepSeek-V2-Lite"] == pytest.approx(17.3, abs=0.01)
    qwen3 = SHAPES[0]
    assert [round(qwen3.expected_touched(n), 1) for n in (1, 8, 64)] == [8.0, 51.6, 125.9]


def test_targets_stand_beside_what_was_measured_or_nothing() -> None:
    times = [
        KernelTime("Qwen3-30B-A3B", 1, "ours", Timing(21.0, 20.0, True), 75e6, 18.0),
        KernelTime("Qwen3-30B-A3B", 1, "ours", Timing(5.0, 4.0, True), 1e6, 1.0, None, "router"),
    ]
    found = {(t["operation"], t["shape"], t["n_tokens"]): t for t in targets(times)}
    assert len(found) == len(TARGETS)
    assert found["experts", "Qwen3-30B-A3B", 1] | {"us": 20.0, "met": True} == found["experts", "Qwen3-30B-A3B", 1]
    assert found["router", "Qwen3-30B-A3B", 1]["us"] == 4.0 and not found["router", "Qwen3-30B-A3B", 1]["met"]
    assert found["experts", "Mixtral-8x7B", 1]["us"] is None and found["experts", "Mixtral-8x7B", 1]["met"] is None
    assert times[0].share_of_roof == pytest.approx(0.9)


def test_what_was_done_is_kept_when_a_section_fails_or_time_is_up(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    seen: list[str] = []

    def fails() -> object:
        assert json.loads(out.read_text())["first"] == [1, 2]
        raise RuntimeError("the driver is gone\nand more")

    sections = [
        Section("first", lambda: [1, 2]),
        Section("second", fails),
        Section("third", lambda: seen.append("third")),
        Section("fourth", lambda: seen.append("fourth")),
    ]
    clock = iter([0.0, 1.0, 2.0, 99.0])
    run_sections(sections, out, {"device": "d"}, end_s=50.0, clock=lambda: next(clock))
    found = json.loads(out.read_text())
    assert found["first"] == [1, 2] and found["device"] == "d" and seen == ["third"]
    assert found["skipped"] == {"second": "RuntimeError: the driver is gone", "fourth": "out of time"}


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    command = [sys.executable, "-m", "scripts.gpu_check", "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no CUDA device") and not out.exists()


def test_operations_beside_the_experts_are_right() -> None:
    repair()
    found = operation_verdicts("cpu", (TINY,), (1, 2))
    assert {v.provider for v in found} == set(operations())
    assert all(v.passed for v in found), [v for v in found if not v.passed]
    assert all(v.error == 0 for v in found if v.provider in ("cache_plan", "gather_rows"))


def test_peers_of_operations_run_and_say_what_is_read() -> None:
    for name, make in operations().items():
        case = make(TINY, 1, torch.float32, "cpu", 0)
        assert case is not None
        assert (case.reads is None) == (name in ("cache_plan", "gather_rows"))
        for peer in case.peers.values():
            peer()


def test_device_driven_tokens_are_those_of_transformers(tiny_qwen3: Path, tmp_path: Path) -> None:
    prompts = [torch.arange(1, 12)[None], torch.arange(20, 29)[None]]
    found = device_driven(tiny_qwen3, tmp_path, torch.device("cpu"), prompts, 4, GateReuse())
    assert (found.n_equal, found.n_tokens, found.explained_by_rounding) == (8, 8, True)
    assert (
        found.counts["hits"] + found.counts["useful"] + found.counts["misses"] == 2 * 3 * 3 * 2
    )  # prompts, steps, layers, top-k
    assert found.counts["prefetches"] > 0 and found.counts["unplaced"] == 0


def test_the_users_own_run_is_read_back_or_its_error_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="backend=cuda, but"):
        host_driven(HOST_DRIVEN)
