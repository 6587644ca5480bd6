"""Training as a user runs it: weights that a run can use, a record of how they came about, and one line for every mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.train import split_by_source
from predictors.recording import RecordedDocument
from prefetch.errors import RecordingError

REPOSITORY = Path(__file__).parents[2]
SMALL = ["train.held_out_one_in=3", "train.batch_rows=32", "train.epochs=2", "tracking=disabled", "n_threads=1"]


def run(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.train", *SMALL, *overrides]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def trained(small_recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    done = run("predictor=corrected_gate", f"recording={small_recording}", f"hydra.run.dir={folder}", "train.seed=3")
    assert done.returncode == 0, done.stderr
    assert "held-out recall@k" in done.stderr
    return folder


def test_the_record_says_how_the_weights_came_about(trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    assert record["training_documents"] == 4 and record["training_tokens"] == 4 * 40 and record["held_out_tokens"] == 2 * 40
    assert record["parameters"] == 124_928 and record["options"]["seed"] == 3
    assert len(record["fit"]["losses"]) == 2 and len(record["fit"]["recalls"]) == 3
    assert record["weights_bytes"] == (trained / "corrected_gate.safetensors").stat().st_size
    assert {"versions", "hardware", "git"} <= set(record["provenance"])


def test_a_run_uses_the_weights(trained: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "experiments.decode", "predictor=corrected_gate", "tracking=disabled", "repeats=1",
        f"predictor.weights={trained / 'corrected_gate.safetensors'}", f"hydra.run.dir={tmp_path}",
        "workload.n_prompts=2", "workload.new_tokens=4", "workload.max_prompt_tokens=32",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arms"]["predicted"]["lossless"]
    assert results["arms"]["predicted"]["quality"]["overall"][0]["recall"] > 0.6


def test_the_same_seed_gives_the_same_weights(trained: Path, small_recording: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    done = run(
        "predictor=corrected_gate",
        f"recording={small_recording}",
        f"hydra.run.dir={tmp_path}",
        "train.seed=3",
        f"output={again}",
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = load_file(again), load_file(trained / "corrected_gate.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["predictor=gate_reuse"], "is not trained: it needs no weights"),
        (["predictor=mlp", "train.epochs=0"], "train.epochs=0: it must be at least 1"),
        (["predictor=mlp", "train.dtype=int8"], "train.dtype=int8: choose one of float32, bfloat16"),
        (["predictor=mlp", "predictor.width=wide"], "predictor.width=wide: it must be of type int"),
        (["predictor=mlp", "train.batch_rows=4096"], "too little training data: 160 tokens, one batch needs 4096"),
        (["predictor=mlp", "train.held_out_one_in=99"], "one in 99 cannot be held out"),
        (["predictor=mlp", "train.split=poetry"], "no document of split 'poetry'"),
    ],
)
def test_a_mistake_is_one_clear_line(overrides: list[str], message: str, small_recording: Path, tmp_path: Path) -> None:
    done = run(f"recording={small_recording}", f"hydra.run.dir={tmp_path}", *overrides)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_damaged_recording_is_named(small_recording: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_recording, tmp_path / "copy"))
    shard = copy / "document-00001" / "states-000.safetensors"
    shard.write_bytes(shard.read_bytes()[:200])
    done = run("predictor=mlp", f"recording={copy}", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 2 and "states-000.safetensors: the states are truncated or damaged" in done.stderr


def test_documents_of_one_source_stay_together() -> None:
    documents = [RecordedDocument(f"{source}@{i}", "training", source, i) for i, source in enumerate("aabbccdde")]
    learned, held_out = split_by_source(documents, 2)
    assert {d.source for d in held_out} == {"b", "d"} and {d.source for d in learned} == {"a", "c", "e"}
    assert len(learned) + len(held_out) == len(documents)
    with pytest.raises(RecordingError, match="come from 5 sources, one in 6 cannot be held out"):
        split_by_source(documents, 6)
