"""The one place that chooses and limits the device that computes."""

from __future__ import annotations

from contextlib import suppress

import torch

from prefetch.errors import ConfigError


def compute_device(backend: str) -> torch.device:
    """The device of `backend`: "torch" computes on the CPU, "cuda" on the current GPU, which it initialises.

    Raises:
        ConfigError: there is no such device here.
    """
    if backend == "torch":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible to PyTorch"
        raise ConfigError(f"backend=cuda, but {built}; backend=torch computes on the CPU")
    torch.cuda.init()
    torch.cuda.synchronize()  # makes PyTorch's context current on this thread
    return torch.device("cuda", torch.cuda.current_device())


def limit_memory(device: torch.device, n_bytes: int) -> None:
    """Let PyTorch allocate at most `n_bytes` on `device`, model, slots and KV cache together: a large card stands in for a small one.

    The context and the kernels' code (some hundred MB) are not PyTorch's and come on top.
    """
    index = torch.cuda.current_device() if device.index is None else device.index  # PyTorch's call takes no device without one
    torch.cuda.set_per_process_memory_fraction(n_bytes / device_memory(device), index)


def device_memory(device: torch.device) -> int:
    """All bytes of the GPU `device`."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def settle(device: torch.device) -> None:
    """Wait for the GPU's work, before memory goes that it may be reading. For teardown: an error that it ended with is left to those
    who need its results, and hides no other."""
    with suppress(RuntimeError):
        torch.cuda.synchronize(device)
