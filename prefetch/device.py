"""The one place that chooses and limits the device that computes."""

from __future__ import annotations

import torch

from prefetch.errors import CapacityError, ConfigError


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

    Raises:
        CapacityError: the device has less.
    """
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    if n_bytes > total_bytes:
        raise CapacityError(
            f"backend.memory is {n_bytes / 1e9:.1f} GB, but {torch.cuda.get_device_name(device)} has {total_bytes / 1e9:.1f} GB"
        )
    torch.cuda.set_per_process_memory_fraction(n_bytes / total_bytes, device)
