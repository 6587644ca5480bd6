"""The replay as a user runs it, on routing that is made up; and beside a run whose figures are."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.machines.base import Link
from experiments.machines.measured import Measured
from experiments.replay import replay_arms
from experiments.results import BELADY, BELADY_OVERLAP, OVERLAP, ArmResult, Results
from prefetch.errors import GatecastError
from prefetch.replay import geometry_of
from prefetch.trace import ROW_ARRAYS, RoutingTrace
from tests.experiments.in_process import run_task
from tests.experiments.synthetic_results import make_results
from tests.prefetch.test_replay import random_trace

REPOSITORY = Path(__file__).parents[2]
N_LAYERS, TOP_K, ROW_BYTES = 3, 2, 1_000_000
SMALL = ["tracking=disabled", "cache.slots=12", "cache.staging=2"]
ROOFLINE = ["machine=pcie4_12gb", "shape.dense_bytes=20e6"]


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sequences of 20 tokens through 3 layers of 8 experts, with guesses of which 3 in 4 are right."""
    trace = random_trace(5, n_tokens=40)
    random = np.random.default_rng(0)
    wrong = random.random(trace.topk_ids.shape) < 0.25
    guessed = np.where(wrong, (trace.topk_ids + 1) % 8, trace.topk_ids).astype(np.int16)
    nothing = np.zeros((*trace.topk_ids.shape[:2], 8), bool)
    path = tmp_path_factory.mktemp("traces") / "trace_gate_reuse.safetensors"
    said = {"row_bytes": str(ROW_BYTES), "model": "made up"}
    dataclasses.replace(trace, guesses={1: guessed}, resident={1: nothing}, metadata=said).save(path)
    return path


@pytest.fixture(scope="module")
def replayed(trace_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    arms = [
        "+arms.guesses=['predictor=recorded']",
        "+arms.cpu=['predictor=none', 'planner=cpu_moe']",
        "+arms.lru=['cache=lru']",
    ]
    run_task("replay", replay_arms, folder, f"trace={trace_file}", *ROOFLINE, *SMALL, *arms)
    return folder


def test_a_replay_leaves_what_a_run_leaves_and_calls_it_simulated(replayed: Path) -> None:
    for name in ("comparison.md", "time_breakdown.png", "tokens_per_s.png", "timeline_slru.json", "trace_guesses.safetensors"):
        assert (replayed / name).stat().st_size > 0, name
    assert not (replayed / "against_measured.csv").exists()
    table = pd.read_csv(replayed / "comparison.csv")
    assert set(table["conditions"]) == {"simulated"}
    markdown = (replayed / "comparison.md").read_text()
    assert "simulated: recorded routing replayed" in markdown and "measured" not in markdown and "✓" not in markdown


def test_arms_lie_between_their_bounds(replayed: Path) -> None:
    results = Results.load(replayed)
    speed = {name: arm.values("tokens_per_s")[0] for name, arm in results.arms.items()}
    assert results.simulated and results.slots == 12
    assert speed["on_demand"] < speed["slru"] < speed["oracle"] < speed["resident"]
    of_these_slots = [name for name in speed if name not in ("cpu", "resident")]  # which load fewer
    assert all(speed[name] <= results.bounds[BELADY_OVERLAP] for name in of_these_slots)
    assert speed["slru"] <= results.bounds[OVERLAP] <= results.bounds[BELADY_OVERLAP]
    assert results.arms["slru"].values("hit_rate")[0] <= results.bounds[BELADY]
    assert results.arms["cpu"].values("in_place_rate")[0] > 0
    assert "ttft_s" not in results.arms["slru"].repeats[0]
    quality = results.arms["guesses"].quality
    assert quality is not None and 0.65 < quality.decode()["recall"] < 0.85


def test_what_was_charged_and_what_was_replayed_is_kept(replayed: Path) -> None:
    results = Results.load(replayed)
    charged = results.provenance["machines"]
    assert set(charged) == set(results.arms)
    assert charged["slru"]["link"] == {"bytes_per_s": 25e9, "latency_s": 10e-6, "chunk_bytes": 2097152}
    assert charged["slru"]["costs"] == charged["guesses"]["costs"] and charged["slru"]["costs"]["dense_s"] == 20e6 / 320e9
    again = RoutingTrace.load(replayed / "trace_guesses.safetensors").metadata
    assert again["model"] == "made up" and "simulated" in again


def test_a_replay_repeats_itself_to_the_last_digit(replayed: Path, trace_file: Path, tmp_path: Path) -> None:
    run_task("replay", replay_arms, tmp_path, f"trace={trace_file}", *ROOFLINE, *SMALL)
    again, first = Results.load(tmp_path), Results.load(replayed)
    for name in ("slru", "predicted", "oracle", "resident", "on_demand"):
        assert again.arms[name].repeats == first.arms[name].repeats


def test_what_is_computed_in_place_or_fits_is_bound_by_no_link(trace_file: Path, tmp_path: Path) -> None:
    """Over a link this slow; the table says so."""
    arms = ["arms.slru=null", "arms.predicted=null", "arms.oracle=null", "+arms.cpu=['predictor=none', 'planner=cpu_moe']"]
    slow = "machine.link.bytes_per_s=1.0e8"
    run_task("replay", replay_arms, tmp_path, f"trace={trace_file}", *ROOFLINE, *SMALL, slow, *arms)
    results = Results.load(tmp_path)
    speed = {name: arm.values("tokens_per_s")[0] for name, arm in results.arms.items()}
    computing_only = results.bounds[OVERLAP]  # the baseline, cpu, loads nothing
    assert speed["on_demand"] <= results.bounds[BELADY_OVERLAP] < speed["cpu"] <= computing_only
    assert results.bounds[BELADY_OVERLAP] < speed["resident"]
    assert "neither holds where experts are computed in place" in (tmp_path / "comparison.md").read_text()


def measured_run(folder: Path) -> Results:
    """A folder as `experiments.decode` leaves it."""
    made = make_results()
    called = {
        "slru": "slru",
        "gate_reuse": "gate_reuse",
        "no_cache": "on_demand",
        "oracle": "oracle",
        "all_resident": "resident",
    }
    arms = {name: made.arms[there] for there, name in called.items()}
    tier = {"kind": "host", "link": None, "chunk_bytes": 1 << 20}
    found = dataclasses.replace(
        made,
        arms=arms,
        config={
            "tier": tier,
            "workload": {"batch_size": 1, "warmup_batches": 1},
            "backend": {"kind": "torch"},
            "cache": {
                "staging": 2,
                "transient": 2,
                "scope": "per_layer",
                "preload": "none",
                "prefetch_admission": "staging",
            },
            "planner": {
                "_target_": "prefetch.planner.top_m.TopM",
                "m": None,
                "extra": 0,
                "max_queued_experts": None,
                "min_useful_share": 0.4,
            },
        },
        provenance={"link_bytes_per_s": 2e9},
        slots=12,
        slots_fraction=0.5,
    )
    folder.mkdir()
    found.save(folder)
    return found


def test_the_machine_of_a_run_is_made_of_that_runs_figures(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = measured_run(tmp_path / "run")
    arms = ["arms.predicted=null", "+arms.gate_reuse=['predictor=recorded']"]
    where = [f"trace={trace_file}", f"machine.run={tmp_path / 'run'}", *SMALL, *arms]
    run_task("replay", replay_arms, tmp_path / "out", *where)
    simulated, compared = Results.load(tmp_path / "out"), pd.read_csv(tmp_path / "out/against_measured.csv")
    assert compared["arm"].tolist() == ["slru", "gate_reuse", "on_demand", "oracle", "resident"]
    assert simulated.arms["resident"].values("tokens_per_s")[0] == pytest.approx(computed_only(run.arms["resident"]), rel=0.02)
    row = compared.set_index("arm").loc["slru"]
    assert row["difference"] == pytest.approx(row["simulated"] / row["measured"] - 1, rel=1e-4)
    run_task("replay", replay_arms, tmp_path / "slow", *where, "machine.link={bytes_per_s: 5.0e7}")
    assert Results.load(tmp_path / "slow").arms["slru"].values("tokens_per_s") < simulated.arms["slru"].values("tokens_per_s")
    assert not (tmp_path / "slow/against_measured.csv").exists()
    capsys.readouterr()
    run_task("replay", replay_arms, tmp_path / "more", *where, "cache.slots=16", "warmup_sequences=0")
    assert not (tmp_path / "more/against_measured.csv").exists()
    assert "cache.slots (16, measured with 12), warmup_sequences (0, measured with 1)" in capsys.readouterr().err


def test_another_link_is_the_runs_but_for_what_is_said(tmp_path: Path) -> None:
    measured_run(tmp_path / "run")
    links = [
        Measured(str(tmp_path / "run"), link=link).the_link() for link in (None, {"bytes_per_s": 1e9}, {"latency_s": 1e-5})
    ]
    assert links == [Link(2e9, 0.0, 1 << 20), Link(1e9, 0.0, 1 << 20), Link(2e9, 1e-5, 1 << 20)]
    for wrong in (5, {"speed": 1e9}):
        with pytest.raises(GatecastError, match="machine.link="):
            Measured(str(tmp_path / "run"), link=wrong).the_link()


def test_a_measured_machine_says_no_more_than_its_run_knows(tmp_path: Path) -> None:
    """An expert that must be read from a disk first, or that a GPU computed, says nothing of computing in place; nor does another model."""
    run = measured_run(tmp_path / "run")
    geometry = geometry_of(random_trace(5), ROW_BYTES)
    costs = Measured(str(tmp_path / "run")).costs(geometry, None, None)
    assert costs.in_place_s == costs.expert_s > 0
    for other in ({"tier": run.config["tier"] | {"kind": "disk"}}, {"backend": {"kind": "cuda"}}):
        dataclasses.replace(run, config=run.config | other).save(tmp_path / "run")
        assert Measured(str(tmp_path / "run")).costs(geometry, None, None).in_place_s is None
    with pytest.raises(GatecastError, match="its model has 24 experts, that of the trace 32"):
        Measured(str(tmp_path / "run")).costs(geometry_of(random_trace(5, n_layers=4), ROW_BYTES), None, None)


def computed_only(resident: ArmResult) -> float:
    """Tokens/s of an arm without its stalls, and without a predictor, which a replay of it has not."""
    busy = [1 - repeat["stall_share"] - repeat["predictor_share"] for repeat in resident.repeats]
    return float(np.median(np.array(resident.values("tokens_per_s")) / busy))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trace=/nonexistent"], "/nonexistent: no such routing trace"),
        (["machine=measured"], "machine.run is missing: give machine.run=..."),
        (["trace=???"], "trace is missing: give trace=..."),
        (["machine=measured", "experiment=as_measured"], "run is missing: give run=..."),
        (
            ["machine=measured", "machine.link.bytes_per_s=1e9"],
            "machine.link is null, so machine.link.bytes_per_s cannot be set",
        ),
        (["shape.dense_bytes=-1"], "shape.dense_bytes=-1.0: it must be at least 0"),
        (["machine=measured", "machine.run=/nonexistent"], "/nonexistent: no results.json in it"),
        (["shape.dense_bytes=null"], "set shape.dense_bytes"),
        (["shape.expert_bytes=0"], "shape.expert_bytes=0: it must be at least 1"),
        (["predictor=gate_reuse"], "predictor gate_reuse reads hidden states"),
        (["+arms.mine=['predictor=pre_gate']"], "predictor pre_gate reads hidden states"),
        (["machine.link=5"], "machine.link=5: it must have bytes_per_s"),
        (["machine.link.bytes_per_s=0"], "machine.link.bytes_per_s is 0"),
        (["machine.memory_bytes_per_s=-1.0"], "machine.memory_bytes_per_s=-1.0: it must be at least 1"),
        (["machine.speed=3"], "machine.speed"),
        (["machine.in_place_bytes_per_s=null", "+arms.cpu=['planner=cpu_moe']"], "machine.in_place_bytes_per_s"),
        (["warmup_sequences=9"], "no decoded token is left of its 2 sequences after warmup_sequences=9"),
        (["max_sequences=0"], "max_sequences=0: it must be at least 1"),
        (["cache.slots=1"], "one token needs 2 experts"),
        (["cache.preload=hot_experts"], "a replay begins with an empty cache"),
        (["+arms.other=['shape.expert_bytes=5']"], "arm other: shape: every arm replays the same trace"),
        (["+arms.mine=['cache=nowhere']"], "arm mine: there is no cache/nowhere"),
    ],
)
def test_a_users_mistake_is_one_clear_line(overrides: list[str], message: str, trace_file: Path, tmp_path: Path) -> None:
    from experiments.launch import one_line

    with pytest.raises(Exception) as raised:
        run_task("replay", replay_arms, tmp_path / "out", f"trace={trace_file}", *ROOFLINE, *SMALL, *overrides)
    assert message in one_line(raised.value)
    assert (
        isinstance(raised.value, GatecastError)
        or "hydra" in type(raised.value).__module__
        or "omegaconf" in type(raised.value).__module__
    )
    assert not (tmp_path / "out/results.json").exists()


def test_a_trace_that_does_not_say_how_large_experts_are(trace_file: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    dataclasses.replace(RoutingTrace.load(trace_file), metadata={}).save(bare)
    with pytest.raises(GatecastError, match="does not say how large an expert is: set shape.expert_bytes"):
        run_task("replay", replay_arms, tmp_path / "out", f"trace={bare}", *ROOFLINE, *SMALL)


@pytest.mark.parametrize("missing", [0, 3, 20])
def test_a_trace_that_lacks_a_forward_pass_is_refused(missing: int, trace_file: Path, tmp_path: Path) -> None:
    """Its guesses and its warm-up would be counted for other sequences or steps than they are of."""
    whole = random_trace(5, n_tokens=40)
    kept = np.arange(whole.n_tokens) != missing
    dataclasses.replace(whole, **{name: getattr(whole, name)[kept] for name in ROW_ARRAYS}).save(tmp_path / "part.safetensors")
    where = f"before step {missing % 20 + 1} of sequence {missing // 20}"
    with pytest.raises(GatecastError, match=f"part.safetensors: a forward pass is missing {where}"):
        run_task("replay", replay_arms, tmp_path / "out", f"trace={tmp_path / 'part.safetensors'}", *ROOFLINE, *SMALL)


def test_the_command(trace_file: Path, tmp_path: Path) -> None:
    options = [f"trace={trace_file}", *ROOFLINE, *SMALL, f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.replay", *options], cwd=REPOSITORY, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "simulated" in done.stdout and "overlap" in done.stdout and "Traceback" not in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
