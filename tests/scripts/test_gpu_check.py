"""The GPU check without a GPU: its peers and our kernels agree in the interpreter, and it says what it cannot do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.gpu.correctness import SMALL, verdicts
from scripts.gpu.kernel_times import KernelTime
from scripts.gpu.providers import PROVIDERS
from scripts.gpu.shapes import SHAPES
from scripts.gpu.timing import Timing
from scripts.gpu_check import TARGETS_US, targets
from tests.kernels.interpreter_bf16 import repair

REPOSITORY = Path(__file__).parents[2]


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
    time = KernelTime("Qwen3-30B-A3B", 1, "ours", Timing(21.0, 20.0, True), 75e6, 18.0)
    found = {(t["shape"], t["n_tokens"]): t for t in targets([time])}
    assert len(found) == len(TARGETS_US)
    assert found["Qwen3-30B-A3B", 1]["us"] == 20.0 and found["Mixtral-8x7B", 1]["us"] is None
    assert time.share_of_roof == pytest.approx(0.9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    command = [sys.executable, "-m", "scripts.gpu_check", "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no CUDA device") and not out.exists()
