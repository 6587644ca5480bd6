"""Result folders: written, read back, refused when damaged, and turned into one comparison by the command itself."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf

from experiments.atomic import write_json
from experiments.report import find_runs, with_distinct_names, write_report
from experiments.report import report as report_of
from experiments.results import ArmResult, Results, legend_order
from prefetch.errors import ConfigError, ResultsError
from tests.experiments.synthetic_results import make_results

REPOSITORY = Path(__file__).resolve().parents[2]


def report(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    command = [sys.executable, "-m", "experiments.report", *options]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False
    )


def test_results_survive_the_round_trip(tmp_path: Path) -> None:
    results = make_results()
    results.save(tmp_path)
    loaded = Results.load(tmp_path)
    assert repr(dataclasses.replace(loaded, name="")) == repr(dataclasses.replace(results, name=""))  # repr: NaN == NaN
    assert loaded.name == tmp_path.name
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert "NaN" not in (tmp_path / "results.json").read_text()  # standard JSON
    assert math.isnan(loaded.arms["slru"].values("link_utilisation")[0])


def test_arms_are_in_one_order_everywhere() -> None:
    order = ["slru", "popularity", "previous_token", "gate_reuse", "no_cache", "oracle", "all_resident"]
    assert [name for name, _ in make_results().ordered()] == order
    assert legend_order([make_results(), make_results(0.5)]) == order


def _without(name: str) -> Any:
    return lambda content: {k: v for k, v in content.items() if k != name}


def _arm(**changes: Any) -> Any:
    return lambda content: content | {"arms": {**content["arms"], "slru": content["arms"]["slru"] | changes}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: [], "not results of this version"),
        (_without("schema"), "schema is None, expected 1"),
        (lambda content: content | {"schema": 99}, "schema is 99, expected 1"),
        (_without("arms"), "KeyError: 'arms'"),
        (_arm(role="winner"), "role 'winner' is none of baseline, predictor, bound"),
        (_arm(repeats=[{"tokens_per_s": "fast"}]), "could not convert"),
        (_arm(repeats=None), "TypeError"),
        (_arm(quality={"overall": []}), "KeyError: 'per_layer'"),
        (lambda content: content | {"slots": "many"}, "ValueError"),
        (lambda c: c | {"arms": c["arms"] | {"second": c["arms"]["slru"]}}, "more than one arm has the role 'baseline'"),
    ],
)
def test_damaged_or_foreign_results_are_refused_by_name(tmp_path: Path, damage: Any, message: str) -> None:
    make_results().save(tmp_path)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ResultsError) as error:
        Results.load(tmp_path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_truncated_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"no results\.json in it"):
        Results.load(tmp_path)
    make_results().save(tmp_path)
    path = tmp_path / "results.json"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ResultsError, match=r"results\.json: damaged"):
        Results.load(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_compares_two_folders(tmp_path: Path) -> None:
    make_results(0.25).save(tmp_path / "outputs" / "a")
    make_results(0.45, emulated=True).save(tmp_path / "outputs" / "b")
    done = report("runs=[outputs/a,outputs/b]", "output=compared", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "compared" / "report.md"
    written = {path.name for path in (tmp_path / "compared").iterdir()}
    pictures = {f"{run}_{kind}.png" for run in "ab" for kind in ("recall_per_layer", "time_breakdown")}
    assert written == {"report.md", "comparison.csv", "tokens_per_s_vs_slots.png", *pictures}
    table = pd.read_csv(tmp_path / "compared" / "comparison.csv")
    assert set(table["run"]) == {"a", "b"}
    assert set(table["conditions"]) == {"measured", "emulated", "simulated"}
    text = (tmp_path / "compared" / "report.md").read_text()
    assert "- `cache.slots`: 0.25 (a); 0.45 (b)" in text
    assert "different machines" not in text
    assert all(f"]({picture})" in text for picture in pictures)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["runs=[nowhere]"], "nowhere: no results.json in it"),
        (["runs=[nowhere]", "outptu=x"], "outptu"),
        (["--multirun", "runs=[a],[b]"], "without --multirun"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, options: list[str], message: str) -> None:
    done = report(*options, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "multirun").exists()


def test_what_was_measured_and_what_was_simulated_share_no_line_of_a_plot(tmp_path: Path) -> None:
    make_results(0.25).save(tmp_path / "a")
    dataclasses.replace(make_results(0.5), simulated=True).save(tmp_path / "b")
    cfg = OmegaConf.create({"runs": [str(tmp_path / "a"), str(tmp_path / "b")]})
    with pytest.raises(ConfigError, match="runs: b simulated, the others measured"):
        report_of(cfg, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_patterns_find_finished_runs_and_name_the_others(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_results().save(tmp_path / name)
    (tmp_path / "c").mkdir()
    found, left_out = find_runs([f"{tmp_path}/*", str(tmp_path / "a")])
    assert found == [tmp_path / "a", tmp_path / "b"]
    assert left_out == [tmp_path / "c"]
    with pytest.raises(ConfigError, match="matches 1 folders, none of which"):
        find_runs([f"{tmp_path}/c*"])
    with pytest.raises(ConfigError, match="matches 0 folders"):
        find_runs([f"{tmp_path}/x/*"])
    with pytest.raises(ConfigError, match="runs is empty"):
        find_runs([])


def test_runs_of_equal_folder_names_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    named = with_distinct_names([make_results(), make_results()], folders)
    assert [run.name for run in named] == ["x-run", "y-run"]


def test_speeds_of_different_machines_come_with_a_warning(tmp_path: Path) -> None:
    here = make_results(name="here")
    there = dataclasses.replace(here, name="there", provenance={"hardware": {"cpu": "another"}})
    assert "different machines" in write_report([here, there], tmp_path)[0].read_text()


def test_a_run_of_one_arm_without_guesses_is_reported_too(tmp_path: Path) -> None:
    arm = ArmResult("predictor", [{"tokens_per_s": 3.0}], None, True, False)
    alone = dataclasses.replace(make_results(), arms={"mine": arm}, bounds={}, name="alone")
    text = write_report([alone], tmp_path)[0].read_text()
    assert "| mine | 3.0 | – | – | – / – | – | ✓ |" in text
