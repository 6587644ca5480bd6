"""A recording is what the layers saw: norms and routers applied to it give the rest. It survives a kill, and damage is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from predictors.recording import Recording
from prefetch.errors import RecordingError
from prefetch.trace import RoutingTrace

REPOSITORY = Path(__file__).parents[2]
BUNDLED = ["documents=bundled", "documents.training=3", "documents.held_out=1", "documents.shifted=1"]
SIZES = ["documents.prompt_tokens=40", "documents.new_tokens=4", "collect.hidden_states=true", "collect.shard_rows=25"]


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "experiments.collect", *BUNDLED, *SIZES, f"hydra.run.dir={folder}", *overrides]


def collect(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ)
    return subprocess.run(command(folder, *overrides), cwd=REPOSITORY, capture_output=True, text=True, env=env, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recording")
    done = collect(made)
    assert done.returncode == 0, done.stderr
    return made


def test_states_are_what_the_layers_saw(folder: Path) -> None:
    recording = Recording(folder)
    assert [d.split for d in recording.documents] == ["training"] * 3 + ["held_out", "shifted"]
    rows = recording.rows(recording.documents)
    model = AutoModelForCausalLM.from_pretrained(REPOSITORY / "models" / "bytes-moe", dtype=torch.float32)
    assert len(rows) == len(model.model.layers) and len(rows[0].token_ids) == 3 * 40 + 2 * (40 + 3)
    for view, layer in zip(rows, model.model.layers, strict=True):
        assert view.residual is not None and view.pre_attention is not None
        torch.testing.assert_close(layer.post_attention_layernorm(view.residual), view.hidden)
        _, _, ids = layer.mlp.gate(view.hidden)
        assert (ids.sort(-1).values == view.topk_ids.sort(-1).values).float().mean() > 0.999  # ties within rounding aside
    embedded = model.model.embed_tokens(rows[0].token_ids)
    torch.testing.assert_close(model.model.layers[0].input_layernorm(embedded), rows[0].pre_attention)


def test_each_token_comes_with_what_the_output_head_read_of_the_one_before(folder: Path) -> None:
    """Against the whole documents in one forward pass of plain transformers."""
    recording = Recording(folder)
    model = AutoModelForCausalLM.from_pretrained(REPOSITORY / "models" / "bytes-moe", dtype=torch.float32)
    for document in recording.documents:
        view = recording.rows([document])[0]
        with torch.no_grad():
            final = model.model(view.token_ids[None]).last_hidden_state[0]
        expected = torch.cat([torch.zeros_like(final[:1]), final[:-1]])
        torch.testing.assert_close(view.previous_final, expected, rtol=1e-3, atol=1e-3)


def test_what_comes_too_late_for_a_prefill_is_not_shown_in_it(folder: Path) -> None:
    recording = Recording(folder)
    (document,) = recording.split("held_out")
    whole = recording.rows([document])[0].previous_final
    assert whole is not None
    for view in recording.views(document, 0):
        known = view.previous_final
        assert known is None if view.step == 0 else torch.equal(known, whole[39 + view.step][None])


def test_a_recording_without_the_final_state_serves_what_does_without_it(copy: Path) -> None:
    whole = Recording(copy)
    expected = whole.rows(whole.documents)
    for shard in copy.glob("document-*/states-*.safetensors"):
        kept = {name: state for name, state in load_file(shard).items() if name != "previous_final"}
        save_file(kept, shard)
    for view, other in zip(whole.rows(whole.documents), expected, strict=True):
        assert view.previous_final is None and torch.equal(view.hidden, other.hidden)


def test_memory_is_bounded_by_a_shard(folder: Path) -> None:
    shards = sorted(folder.glob("document-*/states-*.safetensors"))
    assert [len(load_file(shard)["hidden"]) for shard in shards[:2]] == [25, 15]
    assert max(len(load_file(shard)["hidden"]) for shard in shards) <= 25


def test_views_repeat_the_run_in_order(folder: Path) -> None:
    recording = Recording(folder)
    (document,) = recording.split("held_out")
    views = list(recording.views(document, 7))
    assert [(v.step, v.layer) for v in views] == [(step, layer) for step in range(4) for layer in range(8)]
    assert {v.sequence for v in views} == {7} and [len(v.hidden) for v in views] == [40] * 8 + [1] * 24
    whole = recording.rows([document])
    for layer in range(8):
        assert torch.equal(torch.cat([v.hidden for v in views if v.layer == layer]), whole[layer].hidden)


def test_the_joined_trace_has_all_documents(folder: Path) -> None:
    trace = RoutingTrace.load(folder / "trace.safetensors")
    assert trace.n_tokens == 3 * 40 + 2 * 43 and trace.sequence.max() == 4
    last = Recording(folder).trace(Recording(folder).documents[-1])
    assert (trace.topk_ids[trace.sequence == 4] == last.topk_ids).all()


def test_a_killed_recording_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("document-*/trace.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("document-*/trace.safetensors")}
    assert finished
    done = collect(tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    for ours, theirs in zip(Recording(tmp_path).rows(Recording(tmp_path).documents), _all_rows(folder), strict=True):
        assert torch.equal(ours.hidden, theirs.hidden) and torch.equal(ours.topk_ids, theirs.topk_ids)


def _all_rows(folder: Path) -> list:
    recording = Recording(folder)
    return recording.rows(recording.documents)


def test_another_recording_is_not_mixed_in(folder: Path) -> None:
    done = collect(folder, "documents.training=2")
    assert done.returncode == 2
    assert "holds another recording (other tokens, documents); choose another hydra.run.dir" in done.stderr


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_an_unfinished_recording_is_not_read(copy: Path) -> None:
    (copy / "document-00001" / "trace.safetensors").unlink()
    with pytest.raises(RecordingError, match="1 documents are missing, the recording was interrupted"):
        Recording(copy).split("training")


def test_damage_is_named(copy: Path) -> None:
    recording = Recording(copy)
    shard = copy / "document-00000" / "states-000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(RecordingError, match="states-000.safetensors: the states are truncated or damaged"):
        recording.rows(recording.documents)
    shard.unlink()
    with pytest.raises(RecordingError, match="states and routing differ in length"):
        recording.rows(recording.documents)
    (copy / "document-00000" / "states-001.safetensors").unlink()
    with pytest.raises(RecordingError, match="has no states; record with collect.hidden_states=true"):
        recording.rows(recording.documents)
    with pytest.raises(RecordingError, match="no document of split 'poetry'; it has held_out, shifted, training"):
        recording.split("poetry")
    index = copy / "recording.json"
    index.write_text(json.dumps({"format": "another"}))
    with pytest.raises(RecordingError, match="not a recording of this version"):
        Recording(copy)
    index.write_text("{")
    with pytest.raises(RecordingError, match="damaged or not readable"):
        Recording(copy)
    index.unlink()
    with pytest.raises(
        RecordingError, match="python -m experiments.collect documents=bundled collect.hidden_states=true hydra.run.dir="
    ):
        Recording(copy)
