"""Where a result comes from: versions, hardware, code, command and time, as one dictionary that goes beside the numbers."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "numpy", "pandas", "safetensors", "hydra-core")
REPOSITORY = Path(__file__).resolve().parents[1]
UNKNOWN = "unknown"


def provenance(seed: int, pack: Path | None = None) -> dict[str, Any]:
    """Everything about this process that a reader needs to judge or repeat its results.

    Args:
        seed: of the run.
        pack: the packed expert file, whose file system is reported; None if the run reads none.
    """
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "seed": seed,
        "git": git_state(REPOSITORY),
        "versions": versions(),
        "hardware": hardware(),
        "storage": storage(pack) if pack is not None else None,
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # runnable processes at the start: was the machine busy with other work?
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that results may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, RAM, GPUs, operating system."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository `folder` is in, and whether files differ from it; None without git or outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    if changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}  # the commit is None in a repository that has none yet


def storage(path: Path) -> dict[str, Any]:
    """File system type and device that hold `path`, and the file's size."""
    kind, device = _mount_of(path.resolve())
    return {"file": path.name, "bytes": path.stat().st_size, "file_system": kind, "device": device}


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes. It never falls, so it belongs to a run, not to an arm."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or UNKNOWN


def _mount_of(path: Path) -> tuple[str, str]:
    """File system type and device of the deepest mount above `path`; see proc_pid_mountinfo(5)."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return UNKNOWN, UNKNOWN
    mounts = []
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")
        if path.is_relative_to(point):
            mounts.append((len(point), after.split()[0], after.split()[1]))
    _, kind, device = max(mounts, key=lambda mount: mount[0], default=(0, UNKNOWN, UNKNOWN))
    return kind, device
