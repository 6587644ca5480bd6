"""Provenance against what the operating system and git say themselves."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.atomic import write_json
from experiments.provenance import git_state, peak_rss_bytes, provenance, storage


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_it_has_all_parts_and_is_json(tmp_path: Path) -> None:
    pack = tmp_path / "experts.pack"
    pack.write_bytes(bytes(4096))
    found = provenance(seed=7, pack=pack)
    write_json(tmp_path / "provenance.json", found)
    assert json.loads((tmp_path / "provenance.json").read_text()) == found
    assert found["seed"] == 7
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert found["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert found["storage"]["bytes"] == 4096
    words = Path("/proc/self/cmdline").read_text().split("\0")
    assert shlex.split(found["command"]) == [Path(sys.executable).name, *words[1:-1]]
    assert provenance(seed=7)["storage"] is None


def test_ram_and_file_system_are_what_the_system_reports(tmp_path: Path) -> None:
    total_kb = int(
        next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")).split()[1]
    )
    assert provenance(seed=0)["hardware"]["ram_bytes"] == total_kb * 1024
    reported = subprocess.run(
        ["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.strip()
    found = storage(tmp_path)["file_system"]
    assert found in reported or reported.startswith(("UNKNOWN", "ext2", "overlay"))  # stat says "ext2/ext3" for ext4


def test_git_state_follows_the_repository(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None  # no repository
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == {"commit": None, "dirty": False}  # nothing committed yet
    (tmp_path / "file").write_text("one")
    assert git_state(tmp_path) == {"commit": None, "dirty": True}
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_a_machine_without_git_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_peak_memory_grows_with_use() -> None:
    before = peak_rss_bytes()
    block = np.ones(max(before, 1 << 26), np.uint8)
    assert peak_rss_bytes() >= before + block.nbytes // 2
    assert peak_rss_bytes() < 100 * before
