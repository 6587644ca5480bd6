"""What a reader must know of the device to judge its numbers, and its copy rate, which floors are computed from."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from experiments.provenance import provenance
from scripts.gpu.forked import Row
from scripts.gpu.timing import spin, time_round

COPY_BYTES = 4 << 30
ASKED = (
    "driver_version",
    "clocks.max.sm",
    "clocks.max.mem",
    "clocks.sm",
    "clocks.mem",
    "power.limit",
    "pcie.link.gen.max",
    "pcie.link.width.max",
)


def device_facts(end_s: float) -> Iterator[Row]:
    """One row.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device")
    torch.cuda.init()
    properties = torch.cuda.get_device_properties(0)
    yield {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "ptxas": _ptxas_version(),
        "reported": _reported(),
        "provenance": provenance(seed=0),
    }


def copy_rate(end_s: float) -> Iterator[Row]:
    """Bytes per second of a copy within the device's memory, read and written ones together."""
    n_bytes = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4)
    source = torch.zeros(n_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    spin()
    rounds = [time_round([lambda: target.copy_(source)]) for _ in range(2)]
    yield {"copied_bytes": n_bytes, "bytes_per_s": 2 * n_bytes / (1e-6 * min(found.us for found in rounds))}


def _reported() -> dict[str, str]:
    """By nvidia-smi; clocks now and at most in MHz, watts, and the link's generation and lanes."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as failure:
        return {"problem": f"nvidia-smi: {failure}"}
    return dict(zip(ASKED, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=False))


def _ptxas_version() -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    tool: Any = get_ptxas(arch)
    return str(tool.version)
