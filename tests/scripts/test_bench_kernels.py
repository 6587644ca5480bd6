"""The benchmark of the CPU path compares like with like, and reports the ratio it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from scripts import bench_kernels
from scripts.bench_kernels import OURS, TRANSFORMERS, Shape, check_agreement, compare, implementations, random_inputs

TINY = Shape(hidden=24, intermediate=16, n_experts=6, top_k=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 2, 30])
def test_all_implementations_compute_the_same(n_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        layers = implementations(TINY, dtype, generator)
        assert list(layers) == [OURS, *TRANSFORMERS]
        check_agreement(layers, random_inputs(TINY, n_tokens, dtype, generator))


def test_wrong_results_are_not_timed() -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        layers = implementations(TINY, torch.float32, generator)
        hidden, ids, weights = random_inputs(TINY, 3, torch.float32, generator)
        with pytest.raises(RuntimeError, match="halved differs from transformers' eager by 5.0e-01"):
            check_agreement(layers | {"halved": lambda *x: layers["eager"](*x) / 2}, (hidden, ids, weights))


def test_tokens_draw_distinct_experts_and_weights_that_sum_to_one() -> None:
    _, ids, weights = random_inputs(TINY, 50, torch.float32, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == TINY.top_k for row in ids.tolist()) and set(ids.flatten().tolist()) == set(range(6))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(50))


def test_ratio_is_to_the_fastest_of_theirs_round_by_round() -> None:
    call_s = {OURS: [1.0, 2.0, 4.0], "eager": [9.0, 9.0, 9.0], "grouped_mm": [3.0, 3.0, 2.0]}
    found = compare(call_s)
    assert found["fastest_of_transformers"] == "grouped_mm"
    assert found["speed_ratio"] == {"median": 1.5, "low": 0.5, "high": 3.0, "n": 3}


def test_command_writes_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(bench_kernels, "TURN_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["bench_kernels", str(tmp_path / "b.json"), "--repeats", "3"])
    bench_kernels.main()
    written = json.loads((tmp_path / "b.json").read_text())
    assert [(row["dtype"], row["tokens"]) for row in written["rows"]] == [
        (dtype, tokens) for dtype in bench_kernels.DTYPES for tokens in bench_kernels.TOKENS
    ]
    assert all(len(times) == 3 for row in written["rows"] for times in row["call_s"].values())
    assert written["provenance"]["torch_threads"] == 1
