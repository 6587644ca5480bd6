"""wandb never blocks or fails a run: offline, disabled, and online without a network, without a login, and with a server
that does not answer. Each case is a process of its own, as wandb keeps threads and a service until its process ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.tracking import Tracker
from prefetch.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = """
import logging, struct, sys, threading, zlib
from pathlib import Path
import pandas as pd
import experiments.tracking as tracking

mode, folder = sys.argv[1], Path(sys.argv[2])
tracking.TIMEOUT_S = 2.0
logging.basicConfig(level=logging.WARNING, format="%(message)s")
chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
pixel = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
pixel += chunk(b"IDAT", zlib.compress(bytes(2))) + chunk(b"IEND", b"")
folder.mkdir()
(folder / "dot.png").write_bytes(bytes([137]) + b"PNG\\r\\n" + bytes([26, 10]) + pixel)

tracker = tracking.Tracker(mode)
tracker.start({"cache": {"slots": 0.25}}, folder)
tracker.log({"tokens_per_s": 20.5, "link_utilisation": float("nan")})
tracker.log_table("comparison", pd.DataFrame({"arm": ["slru", "belady"], "tokens_per_s": [20.5, float("nan")]}))
tracker.log_image("dot", folder / "dot.png")
tracker.finish()
tracker.finish()
print("wandb" in sys.modules)
"""


def track(mode: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Track a small run in a process without anybody's login."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    where = {"PYTHONPATH": str(REPOSITORY), "HOME": str(folder.parent), "NETRC": str(folder.parent / "no_netrc")}
    command = [sys.executable, "-c", SCRIPT, mode, str(folder)]
    return subprocess.run(
        command, env=inherited | where | environment, capture_output=True, text=True, check=False, timeout=120
    )


def recorded(folder: Path) -> dict[str, int]:
    """Offline runs, tables and pictures under `folder`."""
    runs = list((folder / "wandb").glob("offline-run-*"))
    found = {"runs": [r for r in runs if list(r.glob("run-*.wandb"))]}
    found |= {
        "tables": [t for r in runs for t in r.rglob("*.table.json")],
        "pictures": [p for r in runs for p in r.rglob("*.png")],
    }
    return {name: len(paths) for name, paths in found.items()}


ALL_OF_IT = {"runs": 1, "tables": 1, "pictures": 1}


def test_offline_writes_everything_and_says_nothing(tmp_path: Path) -> None:
    done = track("offline", tmp_path / "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    assert recorded(tmp_path / "run") == ALL_OF_IT


def test_disabled_does_not_even_import_wandb(tmp_path: Path) -> None:
    done = track("disabled", tmp_path / "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["dot.png"]


def assert_fell_back(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("wandb: cannot go online (")
    assert "recording offline; upload later with: wandb sync" in line
    assert recorded(folder) == ALL_OF_IT


def test_online_without_a_login_falls_back_to_offline(tmp_path: Path) -> None:
    assert_fell_back(track("online", tmp_path / "run"), tmp_path / "run")


@pytest.mark.parametrize("listening", [False, True], ids=["connection refused", "server never answers"])
def test_online_without_a_network_falls_back_to_offline(tmp_path: Path, listening: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = track("online", tmp_path / "run", WANDB_API_KEY="0" * 40, WANDB_BASE_URL=address)
    assert_fell_back(done, tmp_path / "run")


def test_an_unknown_mode_is_an_error_that_names_the_right_ones() -> None:
    with pytest.raises(ConfigError, match="offline, online, disabled"):
        Tracker("sometimes")
