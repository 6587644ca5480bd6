"""The table of hot experts as a user makes it and preloads a cache with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from experiments.results import Results
from predictors.recording import Recording

REPOSITORY = Path(__file__).parents[2]
SMALL = ["workload.n_prompts=2", "workload.new_tokens=8", "workload.max_prompt_tokens=48", "repeats=1", "tracking=disabled"]
NO_OTHER_ARMS = [f"arms.{name}=null" for name in ("predicted", "on_demand", "oracle", "resident")]


def run(experiment: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{experiment}", *overrides], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=240, env=dict(os.environ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def table(small_recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hot")
    done = run("hot_experts", f"recording={small_recording}", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder / "hot_experts.safetensors"


def test_it_counts_the_training_documents(table: Path, small_recording: Path) -> None:
    recording = Recording(small_recording)
    traces = [recording.trace(document) for document in recording.split("training")]
    expected = np.array([[sum((t.topk_ids[:, n] == e).sum() for t in traces) for e in range(32)] for n in range(8)])
    assert np.array_equal(load_file(table)["token_counts"], expected)
    about = json.loads(table.with_name("hot_experts.json").read_text())
    assert about["tokens"] == 6 * 40
    hottest = np.sort(expected.reshape(-1))[::-1][:64]
    assert about["coverage"]["training"] == pytest.approx(hottest.sum() / expected.sum())


@pytest.mark.parametrize(
    ("override", "message"),
    [("split=poetry", "no document of split 'poetry'"), ("recording=nowhere", "nowhere: no recording.json in it")],
)
def test_a_mistake_is_one_clear_line(override: str, message: str, small_recording: Path, tmp_path: Path) -> None:
    done = run("hot_experts", f"recording={small_recording}", f"hydra.run.dir={tmp_path}", override)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_warm_arm_beside_a_cold_one(table: Path, tmp_path: Path) -> None:
    overrides = ["predictor=none", "planner=none", "cache.preload=hot_experts", f"cache.hot_experts={table}"]
    warm = f"+arms.warm={overrides}"
    done = run("decode", *SMALL, *NO_OTHER_ARMS, warm, "workload.warmup_batches=0", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = Results.load(tmp_path)
    transfers, cold = (pd.read_csv(tmp_path / f"transfers_{arm}.csv") for arm in ("warm", "slru"))
    preloads = transfers[transfers["outcome"] == "preload"]
    assert 48 < len(preloads) <= 62, "62 of the 64 slots are the cache's; a layer may have fewer hot experts than slots"
    assert results.arms["warm"].values("preload_bytes") == [preloads["n_bytes"].sum()]
    assert results.arms["slru"].values("preload_bytes") == [0.0] and "preload" not in set(cold["outcome"])
    events = json.loads((tmp_path / "timeline_warm.json").read_text())["traceEvents"]
    drawn = [event for event in events if event["name"] == "preload"]
    assert len(drawn) == len(preloads) and all(event["ts"] < 0 for event in drawn)


def test_a_table_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    options = ["cache.preload=hot_experts", "cache.hot_experts=nowhere.safetensors", "check_tokens=false"]
    done = run("decode", *SMALL, *NO_OTHER_ARMS, *options, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 2 and "nowhere.safetensors: no such predictor weights" in done.stderr
    assert "Traceback" not in done.stderr
