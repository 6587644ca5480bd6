"""What the JIT would compile for launches that really ran, to compare with what was recorded ahead of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from kernels.launch import Launch

Program = tuple[object, ...]


def programs(launches: Iterable[Launch]) -> set[Program]:
    """One for each kernel and specialisation: constexprs by value, integers as 1, multiple of 16 or other, tensors by dtype and alignment."""
    return {
        (launch.kernel.__module__, launch.kernel.__name__, launch.num_warps, launch.num_stages)
        + tuple((name, _specialised(name, value)) for name, value in sorted(launch.arguments.items()))
        for launch in launches
    }


def _specialised(name: str, value: object) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.is_meta or value.data_ptr() % 16 == 0
    if type(value) is not int or name.isupper():
        return value
    return 1 if value == 1 else "of 16" if value % 16 == 0 else "other"
