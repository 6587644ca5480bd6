"""Break-even maps: thresholds worked out by hand, and a small map drawn from routing that is made up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra.utils import instantiate
from joblib.externals.loky.process_executor import TerminatedWorkerError
from omegaconf import OmegaConf

from experiments.break_even import Point, break_even, configured, crossing, speed_ups, thresholds
from experiments.machines.base import Link
from prefetch.errors import CapacityError, ConfigError
from tests.experiments.in_process import run_task
from tests.experiments.test_replay import measured_run
from tests.prefetch.test_replay import random_trace

ROOFLINE = [
    "machine=pcie4_12gb",
    "shape.dense_bytes=20e6",
    "shape.expert_bytes=1000000",
    "cache.staging=2",
    "cache.scope=global",
]


@pytest.mark.parametrize(
    ("ratio", "level", "expected"),
    [
        ([0.9, 1.1, 1.2], 1.0, 0.4),  # half-way between 0.3 and 0.5
        ([1.1, 1.2, 1.3], 1.0, 0.3),  # from the first point on
        ([1.1, 0.9, 1.1], 1.0, 0.75),  # a gain that is lost again is none
        ([0.9, 0.9, 1.0], 1.0, np.nan),  # level is not a gain
        ([0.8, 0.9, 1.2], 1.3, np.nan),
    ],
)
def test_where_a_line_is_crossed_for_good(ratio: list[float], level: float, expected: float) -> None:
    assert crossing([0.3, 0.5, 1.0], ratio, level) == pytest.approx(expected, nan_ok=True)


def test_speed_ups_are_over_the_cache_alone_at_the_same_place() -> None:
    rows = [
        {"slots": s, "link_bytes_per_s": link, "load_per_layer": 1.0, "accuracy": a, "tokens_per_s": speed,
         "overlap_tokens_per_s": 40.0, "belady_overlap_tokens_per_s": 80.0}
        for s, link, a, speed in [
            (0.25, 1e9, np.nan, 10.0), (0.25, 1e9, 0.5, 9.0), (0.25, 1e9, 1.0, 15.0),
            (0.25, 2e9, np.nan, 20.0), (0.25, 2e9, 0.5, 22.0), (0.25, 2e9, 1.0, 24.0),
        ]
    ]  # fmt: skip
    table = speed_ups(pd.DataFrame(rows))
    assert table["ratio"].tolist() == pytest.approx([0.9, 1.5, 1.1, 1.2])
    assert table["overlap"].tolist() == pytest.approx([4.0, 4.0, 2.0, 2.0])
    found = thresholds(table)
    assert found["pays_from"].tolist() == pytest.approx([0.5 + 0.5 / 6, 0.5])
    assert found["worth_it_from"].tolist() == pytest.approx([0.5 + 0.5 * 4 / 6, np.nan], nan_ok=True)
    assert found["belady_overlap"].tolist() == pytest.approx([8.0, 4.0])


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "trace.safetensors"
    random_trace(7, n_tokens=60).save(path)
    return path


def test_a_map_is_drawn_and_no_point_exceeds_its_bound(trace_file: Path, tmp_path: Path) -> None:
    grid = ["links=[1e9,4e10]", "accuracies=[0.5,1.0]", "slots=[0.5]"]
    run_task("break_even", break_even, tmp_path, f"trace={trace_file}", *ROOFLINE, *grid)
    table, found = pd.read_csv(tmp_path / "break_even.csv"), json.loads((tmp_path / "break_even.json").read_text())
    assert len(table) == 4 and found["simulated"] is True and len(found["thresholds"]) == 2
    assert (tmp_path / "break_even.png").stat().st_size > 10_000
    assert (table["ratio"] <= table["belady_overlap"] + 1e-9).all()
    slow, fast = (table[table["link_bytes_per_s"] == link].set_index("accuracy")["ratio"] for link in (1e9, 4e10))
    assert slow[1.0] > slow[0.5] and fast[1.0] > fast[0.5]
    layer_s, latency_s = 10e-6 + (20e6 + 2 * 1e6) / 320e9, 10e-6  # as conf/machine/pcie4_12gb.yaml has it
    assert table["load_per_layer"].to_numpy() == pytest.approx(
        (latency_s + 1e6 / table["link_bytes_per_s"]) / layer_s, rel=1e-4
    )


def test_along_the_map_only_the_bandwidth_of_a_measured_link_changes(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "run")
    tier = {"kind": "host", "link": {"bytes_per_s": 2e9, "latency_s": 3e-5}, "chunk_bytes": 4096}
    dataclasses.replace(run, config=run.config | {"tier": tier}).save(tmp_path / "run")
    machine = {"_target_": "experiments.machines.measured.Measured", "run": str(tmp_path / "run"), "link": None}
    cfg = OmegaConf.create({"machine": machine, "cache": {"slots": 0.25}, "lookahead": 1, "seed": 0})
    at_point = configured(cfg, Point(0.5, 7e9, None), instantiate(cfg.machine).the_link())
    assert at_point.machine.link == {"bytes_per_s": 7e9, "latency_s": 3e-5, "chunk_bytes": 4096}
    assert at_point.cache.slots == 0.5 and cfg.machine.link is None


def test_a_process_that_was_killed_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, trace_file: Path, tmp_path: Path) -> None:
    def killed(**options: object) -> Callable[[object], list]:
        raise TerminatedWorkerError("a worker process was unexpectedly terminated")

    monkeypatch.setattr("experiments.break_even.Parallel", killed)
    with pytest.raises(CapacityError, match="was killed, most likely for want of memory: lower n_jobs"):
        run_task("break_even", break_even, tmp_path, f"trace={trace_file}", *ROOFLINE)


def test_a_load_is_told_with_its_latency() -> None:
    assert Link(1e9, 1e-4, 300).load_s(1000) == pytest.approx(4e-4 + 1e-6)
    assert Link(1e9, 1e-4, 500).load_s(1000) == pytest.approx(2e-4 + 1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["links=[1e9]"], "links=.*it must rise"),
        (["links=[2e9,1e9]"], "links=.*it must rise"),
        (["accuracies=[0.5,1.5]"], "accuracies=.*each must be from 0 to 1"),
        (["slots=[12]"], "slots=.*each must be from 0 to 1"),
        (["slots=[]"], "slots=.*a list of numbers"),
        (["n_jobs=0"], "n_jobs=0: it must be at least 1"),
        (["lookahead=9"], "predictor.lookahead=9: it must be from 1 to 3"),
        (["shape.dense_bytes=null"], "set shape.dense_bytes"),
        (["machine.link=5"], "machine.link=5: it must have bytes_per_s"),
        (["machine=measured", "machine.run=???"], "machine.run is missing"),
    ],
)
def test_a_users_mistake_is_one_clear_line(overrides: list[str], message: str, trace_file: Path, tmp_path: Path) -> None:
    small = ["links=[1e9,2e9]", "accuracies=[0.5,1.0]", "slots=[0.5]"]
    with pytest.raises(ConfigError, match=message):
        run_task("break_even", break_even, tmp_path / "out", f"trace={trace_file}", *ROOFLINE, *small, *overrides)
    assert not (tmp_path / "out").exists()
