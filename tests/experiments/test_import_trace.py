"""Other people's routing becomes a trace of this project by the command itself; a user's mistake is one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments.import_trace import import_trace
from prefetch.errors import ConfigError, GatecastError, TraceError
from prefetch.trace import RoutingTrace
from tests.prefetch.trace_formats.fingerprint_files import write
from tests.prefetch.trace_formats.route_files import Turn, preamble, routing, rows

REPOSITORY = Path(__file__).parents[2]
GPT_OSS = OmegaConf.to_container(OmegaConf.load(REPOSITORY / "conf/format/gpt_oss_fingerprints.yaml"))

ELSEWHERE = """
from pathlib import Path

import numpy as np

from prefetch.trace import RoutingTrace
from prefetch.trace_formats.base import TraceFormat


class TwoExperts(TraceFormat):
    def read(self, path: Path) -> RoutingTrace:
        ids = np.array(path.read_text().split(), np.uint16).reshape(-1, 1, 1)
        step = np.arange(len(ids), dtype=np.int32)
        return RoutingTrace(
            np.zeros_like(step), step, (step > 0).astype(np.uint8), np.zeros_like(step), ids, np.ones(ids.shape, np.float32), 2
        )
"""


def command(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.import_trace", *options], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=240, env=dict(os.environ),
    )  # fmt: skip


def run(folder: Path, file: Path | str, **knobs: Any) -> None:
    import_trace(OmegaConf.create({"format": GPT_OSS | knobs, "file": str(file)}), folder)


def test_the_command_writes_a_trace_and_says_what_is_in_it(tmp_path: Path) -> None:
    dump = tmp_path / "phone.route.csv"
    turns = [Turn(4, 3), Turn(2, 2)]
    dump.write_text(preamble() + "".join(rows(turns, routing(turns))))
    done = command("format=big_moe_on_edge", f"file={dump}", f"hydra.run.dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    written = tmp_path / "out" / "trace.safetensors"
    assert done.stderr.strip() == f"2 sequences, 11 tokens, 3 layers, 16 experts, top-3: {written}"
    np.testing.assert_array_equal(RoutingTrace.load(written).topk_ids, routing(turns))


def test_an_unknown_knob_is_one_clear_line(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    done = command("format=gpt_oss_fingerprints", f"file={path}", "format.keep_lops=true", f"hydra.run.dir={tmp_path / 'out'}")
    assert done.returncode == 2 and "keep_lops" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("file", "knobs", "kind", "said"),
    [
        ("", {}, ConfigError, "file=: no such file; name the dump"),
        ("nowhere.npz", {}, ConfigError, r"file=.*nowhere\.npz: no such file"),
        ("small.npz", {"kep_loops": True}, ConfigError, "format.kep_loops is not an option of .*: keep_loops, max_sequences"),
        ("small.npz", {"keep_loops": "often"}, ConfigError, "format.keep_loops=often: it must be of type bool"),
        ("small.npz", {"_target_": "prefetch.no_such.Format"}, ConfigError, "format._target_=prefetch.no_such.Format cannot be imported"),
        ("small.npz", {"_target_": "argparse.Namespace"}, ConfigError, "format._target_=argparse.Namespace is not a TraceFormat"),
        ("small.npz", {"_target_": None}, ConfigError, "format has no _target_: name the class to use, e.g. through format=NAME"),
        ("truncated.npz", {}, TraceError, r"truncated\.npz: not an npz file with .* or truncated"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_and_nothing_is_written(
    tmp_path: Path, file: str, knobs: dict[str, Any], kind: type[GatecastError], said: str
) -> None:
    path, _ = write(tmp_path)
    (tmp_path / "truncated.npz").write_bytes(path.read_bytes()[:-30])
    (tmp_path / "out").mkdir()
    with pytest.raises(kind, match=said) as error:
        run(tmp_path / "out", tmp_path / file if file else "", **knobs)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_trace_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    with pytest.raises(TraceError, match=r"out/trace\.safetensors: the trace could not be written"):
        run(tmp_path / "out", path)


def test_a_format_of_another_project_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "someones_traces"
    package.mkdir()
    (package / "theirs.py").write_text(ELSEWHERE)
    (tmp_path / "dump.txt").write_text("0 1 1 0")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = OmegaConf.create({"format": {"_target_": "someones_traces.theirs.TwoExperts"}, "file": str(tmp_path / "dump.txt")})
    import_trace(cfg, tmp_path)
    assert RoutingTrace.load(tmp_path / "trace.safetensors").topk_ids.reshape(-1).tolist() == [0, 1, 1, 0]
