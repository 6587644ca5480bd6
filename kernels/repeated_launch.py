"""A launch that is made again and again with other tensors of the same kinds, without Triton's finding out each time what it found before.

On each call of a kernel Triton works out which of its compiled forms the arguments ask for, some 20 us of Python. That depends on dtypes,
on the values of numbers, and on whether a tensor begins at a multiple of 16 bytes: where these stay, so does the compiled kernel, and
calling that takes 4-6 us.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from kernels.launch import ALIGNMENT_BYTES, Launch


class RepeatedLaunch:
    """`launch` with other tensors and widths of its grid.

    Args:
        launch: its numbers stay; so do the tensors that `run` does not name.
    """

    def __init__(self, launch: Launch):
        self.launch = launch
        self._position = {name: position for position, name in enumerate(launch.kernel.arg_names)}
        self._values = [launch.arguments[name] for name in launch.kernel.arg_names]
        self._compiled: Any = None  # stays None in the interpreter

    def run(self, n_columns: int, tensors: dict[str, Tensor]) -> None:
        """Enqueue on the current stream.

        Args:
            n_columns: the grid's second axis.
            tensors: by argument, in place of the launch's, of the same dtypes; always the same names.
        """
        grid, values, starts = (self.launch.grid[0], n_columns, 1), self._values.copy(), 0
        for name, tensor in tensors.items():
            values[self._position[name]] = tensor
            starts |= tensor.data_ptr()
        if starts % ALIGNMENT_BYTES:
            self._changed(grid, tensors).run()
        elif self._compiled is None:
            self._compiled = self._changed(grid, tensors).run()
        else:
            self._compiled[grid](*values)

    def _changed(self, grid: tuple[int, ...], tensors: dict[str, Tensor]) -> Launch:
        return replace(self.launch, grid=grid, arguments={**self.launch.arguments, **tensors})
