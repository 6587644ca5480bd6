"""The main experiment as a user runs it: a process of its own, on the bundled model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from experiments.results import Results
from prefetch.trace import RoutingTrace

REPOSITORY = Path(__file__).parents[2]
ONLY_SLRU = [f"arms.{name}=null" for name in ("predicted", "on_demand", "oracle", "resident")]
SMALL = ["workload.n_prompts=2", "workload.new_tokens=8", "workload.max_prompt_tokens=48", "repeats=1", "tracking=disabled"]


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "experiments.decode", *overrides]


def run(*overrides: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*overrides), cwd=REPOSITORY, capture_output=True, text=True, timeout=240, env={**os.environ, **env}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    done = run(*SMALL, "tracking=offline", "predictor=gate_reuse", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "oracle" in done.stdout and "Traceback" not in done.stderr
    return folder


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    for name in (
        "results.json", "comparison.csv", "time_breakdown.png", "recall_per_layer.png", "tokens_per_s.png",
        "timeline_predicted.json", "trace_slru.safetensors", "trace_predicted.safetensors", ".hydra/config.yaml",
    ):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    assert list(finished.glob("wandb/offline-run-*"))
    assert json.loads((finished / "timeline_predicted.json").read_text())["traceEvents"]


def test_results_hold_the_arms_their_bounds_and_their_conditions(finished: Path) -> None:
    results = Results.load(finished)
    assert {"slru", "predicted", "on_demand", "oracle", "resident"} == set(results.arms)
    assert results.slots == 64 and results.slots_fraction == 0.25
    assert 0 < results.bounds["belady_hit_rate_simulated"] <= 1
    assert all(arm.lossless and not arm.emulated for arm in results.arms.values())
    assert results.arms["resident"].values("hit_rate") == [1.0]
    assert results.arms["on_demand"].values("hit_rate") == [0.0]
    oracle, guessed = results.arms["oracle"].quality, results.arms["predicted"].quality
    assert oracle is not None and guessed is not None
    assert oracle.decode()["recall"] == 1.0
    assert 0.5 < guessed.decode()["recall"] < 1.0
    assert {"versions", "hardware", "git"} <= set(results.provenance)


def test_belady_bounds_every_cache_without_prefetch(finished: Path) -> None:
    results = Results.load(finished)
    assert results.arms["slru"].values("hit_rate")[0] <= results.bounds["belady_hit_rate_simulated"]


def test_the_trace_is_what_every_arm_routed(finished: Path) -> None:
    one, other = (RoutingTrace.load(finished / f"trace_{name}.safetensors") for name in ("slru", "predicted"))
    assert (one.topk_ids == other.topk_ids).all() and (one.token_ids == other.token_ids).all()
    assert one.n_tokens == 2 * (48 + 7)


def test_tables_count_what_calls_count(finished: Path) -> None:
    calls = pd.read_csv(finished / "calls_slru.csv")
    measured = calls[(calls["sequence"] >= 1) & (calls["phase"] == "decode")]
    assert Results.load(finished).arms["slru"].values("hit_rate")[0] == pytest.approx(
        measured["hits"].sum() / measured["needed"].sum()
    )


@pytest.mark.parametrize(("options", "experts", "row_bytes"), [
    (["model.expert_format=int4"], "int4 per 32", 32_768),
    (["model.expert_format=fp8"], "fp8", 57_344),
])  # fmt: skip
def test_quantised_experts_decode_with_fewer_bytes(options: list[str], experts: str, row_bytes: int, tmp_path: Path) -> None:
    """Checked as ever: the same bits in every arm, and the tokens of the whole model with the same rounded weights."""
    done = run(*SMALL, "predictor=gate_reuse", "arms.oracle=null", *options, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = Results.load(tmp_path)
    assert results.quantised == experts and f"of all experts, {experts}, measured" in " ".join(done.stdout.split())
    assert all(arm.lossless for arm in results.arms.values())
    for name in results.arms:
        transfers = pd.read_csv(tmp_path / f"transfers_{name}.csv")
        assert (transfers["n_bytes"] == row_bytes).all()
    calls, transfers = (pd.read_csv(tmp_path / f"{table}_on_demand.csv") for table in ("calls", "transfers"))
    assert transfers["moved_bytes"].sum() == calls["misses"].sum() * row_bytes


def test_a_predictor_outside_the_repository_is_named_by_target(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(
        "import torch\n"
        "from predictors.base import Prediction, Predictor\n"
        "class Everything(Predictor):\n"
        "    def __init__(self, bias=0.0):\n        self.bias = bias\n"
        "    def predict(self, seen):\n"
        "        target = (seen.layer + 1) % self.model.n_layers\n"
        "        return [Prediction(target, torch.arange(self.model.n_experts)[None].float() + self.bias)]\n"
    )
    done = run(
        *SMALL, f"hydra.run.dir={tmp_path / 'out'}", "predictor=none", "predictor._target_=elsewhere.Everything",
        "+predictor.bias=1.0", *ONLY_SLRU, "+arms.mine=[]", PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    quality = Results.load(tmp_path / "out").arms["mine"].quality
    assert quality is not None and 0.0 < quality.decode()["recall"] < 0.5  # four fixed experts of 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cache.slotz=3"], "cache.slotz is not an option; there are slots, staging, "),
        (["+cache.slotz=3"], "cache.slotz is not an option of prefetch.cache.slru.Slru"),
        (["repeats=many"], "repeats"),
        (["repeats=0"], "repeats=0: it must be a whole number, at least 1"),
        (["cache.slots=3"], "one token needs 4 experts per layer"),
        (["cache.slots=lots"], "cache.slots=lots is not a count"),
        (["predictor=crystal_ball"], "there is no predictor/crystal_ball; there are activation_matrices, "),
        (["+arms.mine=['predictor=crystal_ball']"], "arm mine: there is no predictor/crystal_ball; there are "),
        (["+arms.mine=[5]"], "arms.mine=[5]: it must be a list of overrides"),
        (["predictor=mlp"], "make them with python -m experiments.train predictor=mlp output=models/bytes-moe/predictors/mlp"),
        (["planner.m=-1"], "error: planner.m=-1: it must be at least 1"),
        (["predictor._target_=nowhere.Predictor"], "cannot be imported"),
        (["predictor.lookahead=0", "arms.slru=null"], "lookahead"),
        (["cache=lru", "cache.prefetch_admission=policy", "arms.slru=null"], "does not admit prefetches"),
        (["model=local", "model.path=/nonexistent"], "/nonexistent"),
        (["workload.prompts=/nonexistent"], "/nonexistent"),
        (["workload.batch_size=2", "workload.n_prompts=5"], "multiple of workload.batch_size"),
        (["model.expert_format=int3"], "model.expert_format=int3: choose one of plain, int8, int4, fp8, mxfp4"),
        (["model.expert_format=int4", "model.expert_group=128"], "192 columns do not divide into groups of 128 (int4 per 128)"),
        (["model.expert_format=int4", "model.expert_group=7"], "int4 with group = 7: this format takes 128, 64, 32"),
        (["model.expert_group=32"], "model.expert_group=32 is for quantised experts"),
        (["+arms.mine=['model.expert_format=int8']"], "arm mine: every arm runs the same model"),
        (["tier.kind=tape"], "tier.kind=tape: choose one of disk, host"),
        (["tier.link={bytes_per_s: 1e9}"], "bytes_per_s and latency_s and nothing else"),
        (["tier.link={bytes_per_s: -1.0, latency_s: 0.0}"], "bytes_per_s must be above 0"),
        (["tier.n_threads=0"], "tier.n_threads=0: it must be a whole number, at least 1"),
        (["arms.slru=null", "arms.predicted=null", "arms.on_demand=null", "arms.resident=null"], "every arm is an oracle"),
    ],
)
def test_a_users_mistake_is_one_clear_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    done = run(*SMALL, *overrides, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], done.stderr
    assert not (tmp_path / "results.json").exists()


def test_help_may_be_cut_short_by_its_reader() -> None:
    process = subprocess.Popen(command("--help"), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=240) == 1 and process.stderr.read() == ""


def test_ctrl_c_ends_cleanly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(*SMALL, "repeats=500", f"hydra.run.dir={tmp_path}"),
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / ".hydra").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(8)  # into the arms
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "results.json").exists()


def test_ctrl_c_while_libraries_are_imported_is_one_line() -> None:
    source = "import experiments; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", source], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and done.stderr == "interrupted\n"


def sweep(folder: Path, slots: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run(
        "--multirun", *SMALL, f"hydra.sweep.dir={folder}", f"cache.slots={slots}", *ONLY_SLRU, "check_tokens=false", **env
    )


def test_a_sweep_survives_a_failing_job_and_does_not_redo_finished_ones(tmp_path: Path) -> None:
    first = sweep(tmp_path, "3,32,64")
    assert first.returncode == 1
    assert "2 finished, 1 failed" in first.stderr and "one token needs 4 experts" in first.stderr
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")}
    assert len(stamps) == 2
    again = sweep(tmp_path, "32,64,96")
    assert again.returncode == 0 and "0 failed" in again.stderr
    assert again.stderr.count("already finished") == 2
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert len(list(tmp_path.glob("*/results.json"))) == 3


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("--multirun", *SMALL, f"hydra.sweep.dir={tmp_path}", "cache.slots=32,48,64", *ONLY_SLRU, "check_tokens=false"),
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/finished.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_before = len(list(tmp_path.glob("*/finished.json")))
    assert 1 <= n_before < 3
    done = sweep(tmp_path, "32,48,64")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("already finished") == n_before
    assert len(list(tmp_path.glob("*/results.json"))) == 3


def test_the_joblib_launcher_runs_jobs_in_parallel(tmp_path: Path) -> None:
    parallel = run(
        "--multirun", *SMALL, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path / 'joblib'}",
        "cache.slots=32,64", *ONLY_SLRU, "check_tokens=false",
    )  # fmt: skip
    assert parallel.returncode == 0, parallel.stderr
    assert len(list((tmp_path / "joblib").glob("*/results.json"))) == 2
