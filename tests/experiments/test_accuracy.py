"""The comparison of predictors as a user runs it, on a small recording of the bundled model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

REPOSITORY = Path(__file__).parents[2]
PREDICTORS = "predictors=[popularity,gate_reuse,'gate_reuse lookahead=2',corrected_gate,oracle,own_gate]"
SMALL = ["held_out_one_in=2", "bootstrap=50", "tracking=disabled"]


def run(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.accuracy", *overrides], cwd=REPOSITORY, capture_output=True, text=True, timeout=240,
        env=dict(os.environ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(small_recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accuracy")
    done = run(PREDICTORS, f"recording={small_recording}", *SMALL, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "gate_reuse lookahead=2" in done.stdout and "…" not in done.stdout and "Traceback" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def table(finished: Path) -> pd.DataFrame:
    return pd.read_csv(finished / "accuracy.csv").set_index(["predictor", "split", "phase"]).sort_index()


def test_it_leaves_tables_and_pictures(finished: Path) -> None:
    for name in ("recall_by_layer", "recall_by_distance", "recall_by_budget", "reliability", "cost_against_recall"):
        assert (finished / f"{name}.png").stat().st_size > 10_000
    stored = json.loads((finished / "accuracy.json").read_text())
    assert {"config", "provenance", "accuracy", "per_layer", "gain", "cost"} == set(stored)
    assert len(stored["accuracy"]) == 6 * 2 * 2 and {row["lookahead"] for row in stored["accuracy"]} == {1, 2}


def test_the_oracle_is_always_right_and_popularity_far_from_it(table: pd.DataFrame) -> None:
    rates = ["recall", "exact_set", "weight_mass", "cold_recall_slru_25", "cold_recall_lru_45", "recall_low"]
    assert (table.loc["oracle", rates] == 1.0).all(axis=None)
    assert (table.loc["oracle", "calibration_error"] < 0.02).all()
    assert (table.loc["popularity", "recall"] < 0.5).all()


def test_states_and_routing_of_the_recording_belong_together(table: pd.DataFrame) -> None:
    assert (table.loc["own_gate", "recall"] > 0.999).all()


def test_gate_reuse_passes_the_acceptance_line_and_fades_with_distance(table: pd.DataFrame) -> None:
    one, two = table.loc["gate_reuse", "recall"], table.loc["gate_reuse lookahead=2", "recall"]
    assert (one > 0.65).all() and (one > two).all() and (two > 0.45).all()
    assert (table.loc["corrected_gate", "recall"] > one).all()


def test_intervals_hold_the_rate_and_budgets_only_help(table: pd.DataFrame) -> None:
    assert (table["recall_low"] <= table["recall"] + 1e-9).all() and (table["recall"] <= table["recall_high"] + 1e-9).all()
    budgets = table[[f"recall_plus_{m}" for m in range(5)]]
    assert (budgets.diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    assert (table["prescope_precision"] == table["precision_3"]).all()


def test_costs_count_what_the_networks_hold(finished: Path) -> None:
    costs = pd.read_csv(finished / "cost.csv").set_index("predictor")
    assert costs.loc["gate_reuse", "parameters"] == 0 and costs.loc["gate_reuse", "flops"] == 2 * 192 * 32
    assert costs.loc["corrected_gate", "parameters"] == 124_928
    assert (costs["call_us"] > 0).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["predictors=[]"], "predictors is empty"),
        (["predictors=[mlp,mlp]"], "names one twice"),
        (["predictors=[mlp]"], "reference=gate_reuse: it must be one of predictors"),
        (["predictors=['gate_reuse lookahead=9']", "reference='gate_reuse lookahead=9'"], "predictor.lookahead=9"),
        (["predictors=['gate_reuse wings=2']", "reference='gate_reuse wings=2'"], "wings is not an option"),
        (["predictors=[gate_refuse]", "reference=gate_refuse"], "predictors names 'gate_refuse'"),
        (["caches.slru_25='slru slots=300'"], "caches.slru_25: slots=300 is not between 1 slot and all 256 experts"),
        (["splits=[poetry]"], "no document of split 'poetry'"),
        (["bootstrap=0"], "bootstrap=0: it must be at least 1"),
        (["recording=nowhere"], "nowhere: no recording.json in it"),
    ],
)
def test_a_mistake_is_one_clear_line(overrides: list[str], message: str, small_recording: Path, tmp_path: Path) -> None:
    done = run(f"recording={small_recording}", *SMALL, f"hydra.run.dir={tmp_path}", *overrides)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "accuracy.json").exists()


def test_a_sweep_whose_jobs_fail_says_so(tmp_path: Path) -> None:
    done = run("--multirun", "recording=nowhere", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 1 and "0 finished, 2 failed" in done.stderr


def test_the_default_comparison_needs_no_training_first() -> None:
    known = {path.stem: OmegaConf.load(path) for path in (REPOSITORY / "conf/predictor").glob("*.yaml")}
    shipped = {path.stem for path in (REPOSITORY / "models/bytes-moe/predictors").glob("*.safetensors")}
    ready = {name for name, cfg in known.items() if "weights" not in cfg or name in shipped}
    labels = OmegaConf.load(REPOSITORY / "conf/accuracy.yaml").predictors
    assert {label.split()[0] for label in labels} <= ready  # not all: a new predictor needs no entry here
    assert [label for label in labels if label.startswith("gate_reuse")][1:] == [f"gate_reuse lookahead={d}" for d in (2, 3, 4)]
