"""The GPU check without a GPU: its peers and our kernels agree in the interpreter, and it says what it cannot do."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.cache_plan import cache_plan_reference
from kernels.device_cache import CachePlan, Counter, DeviceCache, Segment
from kernels.launch import Launch, recorded_launches
from predictors.gate_reuse import GateReuse
from prefetch.errors import ResultsError
from scripts import gpu_check
from scripts.gpu.bundled_tokens import HOST_DRIVEN, device_driven, host_driven
from scripts.gpu.correctness import SMALL, rehearse_verdicts, verdicts
from scripts.gpu.decode_model import DECODE_SHAPES
from scripts.gpu.findings import Findings
from scripts.gpu.forked import Row, Work
from scripts.gpu.kernel_times import sets_needed, too_much
from scripts.gpu.operation_times import operation_verdicts, rehearse_operation_verdicts
from scripts.gpu.operations import operations, timed_operations
from scripts.gpu.plans import checked_run, planner_calls
from scripts.gpu.providers import OURS, PROVIDERS, make_problem, reference
from scripts.gpu.sections import FIRST, OPERATION_TOKENS, PLAN_SHAPES, Section, sections
from scripts.gpu.shapes import SHAPES, TOKENS, MoEShape
from scripts.gpu.thread_transfers import thread_transfer_rates
from scripts.gpu.variants import VARIANTS, rehearse_variants, variant_verdicts
from scripts.gpu_check import run_sections
from tests.kernels.interpreter_bf16 import repair
from tests.prefetch.transfers.stand_in_driver import StandInDriver
from tests.scripts.launched_programs import programs

REPOSITORY = Path(__file__).parents[2]
TINY = MoEShape("tiny", hidden=128, n_experts=8, top_k=2, intermediate=64, n_layers=2)
DEVICE = {"name": "A card", "provenance": {"git": None}}


def test_all_peers_and_our_kernels_compute_the_same(launched: list[Launch]) -> None:
    repair()
    found = list(verdicts("cpu", SMALL[2:], (1, 5)))
    assert {v.provider for v in found} == set(PROVIDERS) and {v.dtype for v in found} == {"float32", "float16", "bfloat16"}
    assert all(v.passed for v in found), [v for v in found if not v.passed]
    with recorded_launches() as rehearsed:
        rehearse_verdicts(SMALL[2:], (1, 5))
    assert programs(launched) == programs(rehearsed)


def test_a_wrong_or_failing_provider_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(problem: object) -> torch.Tensor:
        raise RuntimeError("not on this card\nand more")

    monkeypatch.setitem(PROVIDERS, "torch_loop", lambda p: lambda: torch.zeros_like(p.x))
    monkeypatch.setitem(PROVIDERS, "ours", fails)
    found = {v.provider: v for v in verdicts("cpu", SMALL[2:], (1,)) if v.dtype == "float32"}
    assert not found["torch_loop"].passed and found["torch_loop"].error == pytest.approx(1.0)
    assert not found["ours"].passed and found["ours"].problem == "RuntimeError: not on this card"


def test_a_problem_that_does_not_fit_is_told_for_every_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("scripts.gpu.correctness.make_problem", no_room)
    found = list(verdicts("cpu", SMALL[2:], (1,)))
    assert len(found) == 3 * len(PROVIDERS)
    assert all(not v.passed and v.problem == "OutOfMemoryError: CUDA out of memory" for v in found)


def test_what_is_timed_is_compared_with_fp32() -> None:
    p = make_problem(TINY, 5, torch.bfloat16, "cpu", 0)
    exact = PROVIDERS["torch_loop"](make_problem(TINY, 5, torch.float32, "cpu", 0))()
    assert reference(p).dtype == torch.float32 and reference(p).shape == exact.shape


def test_variants_of_real_models_are_right(launched: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    repair()
    monkeypatch.setattr("scripts.gpu.variants.DTYPES", (torch.float32,))
    found = list(variant_verdicts("cpu", (torch.float32,)))
    assert {v.provider for v in found} == set(VARIANTS)
    assert all(v.passed for v in found), [v for v in found if not v.passed]
    with recorded_launches() as rehearsed:
        rehearse_variants()
    assert programs(launched) == programs(rehearsed)


def test_shapes_are_those_of_the_models() -> None:
    mb = {shape.name: shape.geometry(torch.bfloat16).row_bytes / 1e6 for shape in SHAPES}
    assert mb["Qwen3-30B-A3B"] == pytest.approx(9.44, abs=0.01) and mb["Mixtral-8x7B"] == pytest.approx(352.3, abs=0.1)
    assert mb["Qwen3.6-35B-A3B"] == pytest.approx(6.29, abs=0.01) and mb["DeepSeek-V2-Lite"] == pytest.approx(17.3, abs=0.01)
    qwen3 = SHAPES[0]
    assert [round(qwen3.expected_touched(n), 1) for n in (1, 8, 64)] == [8.0, 51.6, 125.9]


def test_ours_comes_before_what_may_break() -> None:
    assert list(PROVIDERS)[: len(OURS)] == list(OURS)


def test_sets_of_weights_exceed_l2_and_waste_is_refused() -> None:
    mb = 1e6
    assert sets_needed(75 * mb, 50_000_000) == 4 and sets_needed(0.5 * mb, 50_000_000) == 300
    row_bytes = SHAPES[0].geometry(torch.bfloat16).row_bytes
    assert too_much("ours", 4096, row_bytes, 1) is None and too_much("ours_decode", 8, row_bytes, 1) is None
    assert "would read 39 GB" in str(too_much("ours_decode", 4096, row_bytes, 1))
    assert "gathers 39 GB of weights, 60 GB are free" in str(
        too_much("transformers_batched_mm", 4096, row_bytes, 60_000_000_000)
    )


def test_sections_are_named_once_and_most_wanted_first() -> None:
    names = [section.name for section in sections()]
    assert len(set(names)) == len(names)
    kernels = [name for name in names if name.startswith("kernels ")]
    assert kernels[: len(FIRST)] == [f"kernels {model} T={n}" for model, n in FIRST] and len(kernels) == len(SHAPES) * len(
        TOKENS
    )
    assert names[0].startswith("correctness ") and names[-1] == "tokens host-driven"
    assert sum(name.startswith("decode ") for name in names) == 2 * len(DECODE_SHAPES)


def one(end_s: float) -> Iterator[Row]:
    yield {"n": 1}
    yield {"n": 2}


def dies(end_s: float) -> Iterator[Row]:
    yield {"n": 1}
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_done_is_kept_when_a_section_dies_or_time_is_up(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    clock = iter([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 99.0])
    to_do = [Section("first", one, 30), Section("second", dies, 30), Section("third", one, 30)]
    run_sections(to_do, Findings(out, DEVICE), "abc", end_s=50.0, clock=lambda: next(clock))
    found = json.loads(out.read_text())
    assert found["verdicts"]["copy_bytes_per_s"] is None
    assert found["device"] == DEVICE and found["skipped"] == {"third": "out of time"}
    assert found["sections"]["first"] == {"rows": [{"n": 1}, {"n": 2}], "commit": "abc", "seconds": 1.0, "stopped": None}
    assert found["sections"]["second"] == {"rows": [{"n": 1}], "commit": "abc", "seconds": 1.0, "stopped": "ended by SIGKILL"}


def test_a_later_run_goes_on_where_this_one_ended(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    run_sections([Section("first", one, 30), Section("second", dies, 30)], Findings(out, DEVICE), "abc", end_s=float("inf"))
    later = Findings(out, DEVICE)
    assert later.holds("first") and not later.holds("second") and not later.holds("third")
    run_sections([Section("second", one, 30)], later, "def", end_s=float("inf"))
    found = json.loads(out.read_text())["sections"]
    assert found["first"]["commit"] == "abc" and found["second"]["rows"] == [{"n": 1}, {"n": 2}]
    with pytest.raises(ResultsError, match="holds results of A card, this is Another"):
        Findings(out, DEVICE | {"name": "Another"})


def two_and_dies(end_s: float) -> Iterator[Row]:
    yield from one(end_s)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_is_stopped_sooner_loses_no_rows_of_the_one_before(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    kept = []
    for commit, work in {"longer": two_and_dies, "shorter": dies, "as long": two_and_dies, "whole": one}.items():
        run_sections([Section("first", work, 30)], Findings(out, DEVICE), commit, end_s=float("inf"))
        section = json.loads(out.read_text())["sections"]["first"]
        assert section["rows"] == [{"n": 1}, {"n": 2}]
        kept.append((section["commit"], section["stopped"]))
    by_signal = "ended by SIGKILL"
    assert kept == [("longer", by_signal), ("longer", by_signal), ("as long", by_signal), ("whole", None)]


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    command = [sys.executable, "-m", "scripts.gpu_check", "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no CUDA device") and not out.exists()


def test_operations_beside_the_experts_are_right(launched: list[Launch]) -> None:
    repair()
    found = [verdict for name in operations() for verdict in operation_verdicts(name, "cpu", (TINY,), (1, 2))]
    assert {v.provider for v in found} == set(operations())
    assert all(v.passed for v in found), [v for v in found if not v.passed]
    exact = [v for v in found if v.provider in ("cache_plan", "gather_rows")]
    assert exact and all(v.error == v.tolerance == 0 for v in exact)
    with recorded_launches() as rehearsed:
        for name in operations():
            rehearse_operation_verdicts(name, (TINY,), (1, 2))
    assert programs(launched) == programs(rehearsed)


def test_the_planner_is_checked_on_caches_that_fill_and_evict() -> None:
    total = torch.zeros(len(Counter), dtype=torch.int64)
    for shape, n_tokens in itertools.product(PLAN_SHAPES, OPERATION_TOKENS):
        cache, calls = checked_run(shape, n_tokens, "cpu")
        for call in calls:
            cache_plan_reference(cache, *call)
        assert int((cache.segment >= Segment.PROBATION).sum()) == cache.capacity
        assert shape.n_layers == 1 or cache.counters[Counter.EVICTIONS] > cache.capacity // 4
        total += cache.counters
    assert all(total[counter] > 0 for counter in Counter if counter is not Counter.UNPLACED)


def test_a_plan_that_is_wrong_late_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    n_plans = len(checked_run(TINY, 1, "cpu")[1])
    made: list[CachePlan] = []

    def wrong_last(cache: DeviceCache, *call: Any) -> CachePlan:
        made.append(cache_plan_reference(cache, *call))
        if len(made) == n_plans:
            made[-1].slot_ids[0, 0] += 1
        return made[-1]

    monkeypatch.setattr("scripts.gpu.plans.cache_plan", wrong_last)
    (found,) = operation_verdicts("cache_plan", "cpu", (TINY,), (1,))
    assert len(made) == n_plans > 2 * TINY.n_layers and found.error and not found.passed


def test_peers_of_operations_run_and_say_what_is_read() -> None:
    for make in timed_operations().values():
        case = make(TINY, 1, torch.float32, "cpu", 0)
        assert case is not None and case.reads is not None
        rows, slots = case.reads
        assert rows.dtype == torch.uint8 and int(slots.max()) < len(rows)
        for peer in case.peers.values():
            peer()


def test_the_planner_is_timed_over_full_caches_that_miss(launched: list[Launch]) -> None:
    """Every call has ids of its own, and a second pass finds no more than the first left it."""
    ids = torch.stack([torch.stack([torch.randperm(8)[:2] for _ in range(2)]) for _ in range(4)])[:, :, None].numpy()
    calls = planner_calls(TINY, ids, ids[:, :, 0], 4, "cpu")
    assert len(calls) == 4 * TINY.n_layers
    for call in calls:
        call()
    with recorded_launches() as rehearsed:
        for call in planner_calls(TINY, ids, ids[:, :, 0], 4, "meta"):
            call()
    assert programs(launched) == programs(rehearsed)


def test_the_runtimes_transfers_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.gpu.thread_transfers.N_ROWS", 4)
    found = list(thread_transfer_rates(TINY, torch.float32, torch.device("cpu"), StandInDriver(tmp_path)))
    assert len(found) == 8 and all(rate.way.startswith("copy engine, ") and rate.bytes_per_s > 0 for rate in found)
    pickle.dumps([asdict(rate) for rate in found])


@pytest.mark.parametrize("fused", [False, True], ids=["the model's routers", "fused"])
def test_device_driven_tokens_are_those_of_transformers(fused: bool, tiny_qwen3: Path, tmp_path: Path) -> None:
    prompts = [torch.arange(1, 12)[None], torch.arange(20, 29)[None]]
    found = device_driven(tiny_qwen3, tmp_path, torch.device("cpu"), prompts, 4, GateReuse(), fuse_routers=fused)
    assert (found.n_equal, found.n_tokens, found.explained_by_rounding) == (8, 8, True)
    n_needed = 2 * 3 * 3 * 2  # prompts, steps, layers, top-k
    assert found.counts["hits"] + found.counts["useful"] + found.counts["misses"] == n_needed
    assert found.counts["prefetches"] > 0 and found.counts["unplaced"] == 0


def test_the_users_own_run_is_read_back_or_its_error_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="backend=cuda, but"):
        host_driven(HOST_DRIVEN, 120)


FACTS = {
    "name": "A card", "memory_bytes": 12e9, "multiprocessors": 1, "cuda": "13.0", "ptxas": "12.8", "capability": [9, 0],
    "reported": {}, "provenance": {"git": {"commit": "abc"}, "versions": {}},
}  # fmt: skip


def check(passed: bool) -> Row:
    verdict = {"provider": "ours", "shape": "odd", "n_tokens": 1, "dtype": "float32", "error": 0.5, "tolerance": 1.0}
    return verdict | {"problem": None, "passed": passed, "ours": True}


@pytest.mark.parametrize(
    "rows, then, message",
    [
        ([check(True)], None, None),
        ([check(False)], None, "a kernel of this project is wrong"),
        ([check(True)], dies, "not checked to its end: correctness experts"),
    ],
)
def test_it_ends_well_only_if_all_was_checked_and_right(
    rows: list[Row], then: Work | None, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(end_s: float) -> Iterator[Row]:
        yield from rows
        if then is not None:
            list(then(end_s))

    monkeypatch.setattr(gpu_check, "_device", lambda: FACTS)
    monkeypatch.setattr(gpu_check, "sections", lambda: [Section("correctness experts", run, 30)])
    monkeypatch.setattr(gpu_check, "compiling", lambda to_do, capability: Section("programs", one, 30))
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "check.json"), "--commit", "def"])
    if message is None:
        gpu_check.main()
    else:
        with pytest.raises(SystemExit, match=message):
            gpu_check.main()
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["sections"]["correctness experts"]["commit"] == "def" and found["verdicts"]["targets"]
