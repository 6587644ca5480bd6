"""What every launcher does before and at its launch: input checks with one clear error, then one kernel call.

A `Launch` is a kernel with its grid and arguments, not yet run. The launcher runs it; the ahead-of-time compiler
(`kernels/aot.py`) builds the same object from meta tensors and compiles exactly what would have been run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from prefetch.errors import KernelInputError

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_TRITON = (3, 6)  # older ones lack features that the kernels use, and are not tested here
ALIGNMENT_BYTES = 16  # one vector load

# (first version, first version without the fault, compute capability, trait of the affected kernels, source)
KNOWN_FAULTS = (
    ((3, 4), (3, 10), 9, "register_wgmma", "ptxas <= 12.9 corrupts WGMMA whose operand is in registers: triton #11781"),
    ((3, 7, 1), (3, 7, 2), 9, "chained_wgmma", "several dots in a row read shared memory out of bounds: triton #11366"),
)


@dataclass(frozen=True)
class Launch:
    """One kernel call: constexprs and runtime arguments by name."""

    kernel: Any  # JITFunction, or its interpreted twin
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | bool | None]
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> Any:
        """Enqueue on the current stream; returns the compiled kernel, None where there is none: in the interpreter, and where launches are recorded."""
        if (recorded := _recorded.get()) is not None:
            recorded.append(self)
            return None
        return self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


_recorded: ContextVar[list[Launch] | None] = ContextVar("_recorded", default=None)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """What is launched inside, in order, and not run: code can be led over meta tensors to learn which programs it needs."""
    recorded: list[Launch] = []
    token = _recorded.set(recorded)
    try:
        yield recorded
    finally:
        _recorded.reset(token)


def triton_version() -> tuple[int, ...]:
    """(3, 7, 1) for '3.7.1+git...'."""
    return tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3] if part.isdigit())


def check_launchable(device: torch.device, traits: Sequence[str] = ()) -> None:
    """Refuse to launch where the kernel cannot run or is known to be compiled wrongly.

    Args:
        device: where the tensors are.
        traits: what in this kernel has met compiler faults: any of those in `KNOWN_FAULTS`.

    Raises:
        KernelInputError: no GPU and no interpreter, or a Triton version that is too old or known to miscompile.
    """
    version = triton_version()
    if version < OLDEST_TRITON:
        raise KernelInputError(f"triton {triton.__version__} is too old for these kernels: install 3.6 or newer")
    if device.type == "meta" and _recorded.get() is not None:
        return
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        found = "" if torch.cuda.is_available() else " and this machine has no CUDA device"
        raise KernelInputError(
            f"the tensors are on the CPU{found}: Triton kernels need CUDA tensors; call the *_reference function of the "
            "same file for the PyTorch path, or set TRITON_INTERPRET=1 before Python starts"
        )
    if device.type not in ("cpu", "cuda"):
        raise KernelInputError(f"the tensors are on '{device}': Triton kernels need CUDA tensors")
    if device.type == "cuda" and traits:
        check_miscompiled(version, torch.cuda.get_device_capability(device)[0], traits)


def check_miscompiled(version: tuple[int, ...], capability: int, traits: Sequence[str]) -> None:
    """Refuse a kernel that this Triton version is known to compile wrongly for this compute capability (major)."""
    for first, fixed, affected, trait, source in KNOWN_FAULTS:
        if trait in traits and capability == affected and first <= version < fixed:
            shown = ".".join(map(str, version))
            raise KernelInputError(
                f"triton {shown} is known to miscompile this kernel on compute capability {affected}.x ({source})"
            )


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    contiguous_dims: int | None = None,
) -> None:
    """Refuse a tensor that the kernel would misread.

    Args:
        name: how the launcher's caller knows it.
        shape: sizes, None where any size >= 1 will do.
        dtypes: the allowed ones.
        device: where it must be.
        contiguous_dims: how many trailing dimensions must be contiguous; None = all.

    Raises:
        KernelInputError: naming the argument, what it is and what would be right.
    """
    if tensor.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise KernelInputError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")
    if tensor.numel() == 0:
        raise KernelInputError(f"{name} has shape {list(tensor.shape)}: no size may be 0")
    if tensor.dtype not in dtypes:
        raise KernelInputError(f"{name} is {_names([tensor.dtype])}, expected {_names(dtypes)}")
    if tensor.device != device:
        raise KernelInputError(f"{name} is on {tensor.device}, expected {device} like the other arguments")
    if not _trailing_contiguous(tensor, tensor.dim() if contiguous_dims is None else contiguous_dims):
        raise KernelInputError(
            f"{name} has strides {list(tensor.stride())} for shape {list(tensor.shape)}: make it contiguous()"
        )


def check_aligned(name: str, tensor: Tensor) -> None:
    """Refuse a start address that vector loads cannot use."""
    if tensor.device.type != "meta" and tensor.data_ptr() % ALIGNMENT_BYTES:
        raise KernelInputError(
            f"{name} starts {tensor.data_ptr() % ALIGNMENT_BYTES} bytes past a multiple of {ALIGNMENT_BYTES}: clone() it"
        )


def check_at_most(name: str, value: int, limit_name: str, limit: int) -> None:
    """Refuse a count outside 1..limit."""
    if not 1 <= value <= limit:
        raise KernelInputError(f"{name} = {value} must be between 1 and {limit_name} = {limit}")


def _trailing_contiguous(tensor: Tensor, n_dims: int) -> bool:
    expected = 1
    for size, stride in list(zip(tensor.shape, tensor.stride(), strict=True))[::-1][:n_dims]:
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
