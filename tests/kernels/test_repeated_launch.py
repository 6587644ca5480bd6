"""A repeated launch runs what a launch would, and on a GPU by way of the compiled kernel wherever that is the right one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.launch import Launch
from kernels.repeated_launch import RepeatedLaunch


@triton.jit
def _scale_kernel(x_ptr, out_ptr, factor, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at) * factor)


def test_a_repeated_launch_takes_other_tensors_and_widths() -> None:
    x, out = torch.arange(24.0), torch.full((24,), torch.nan)
    repeated = RepeatedLaunch(Launch(_scale_kernel, (3, 1), {"x_ptr": x, "out_ptr": out, "factor": 0.5, "SIZE": 8}))
    for other in (x + 1, x[1:17].clone()):
        repeated.run(2, {"x_ptr": torch.cat([other, x])})
        assert torch.equal(out[: len(other)], other / 2)


class CompilingKernel:
    """Answers as Triton's kernels do on a GPU; notes who was called with what."""

    arg_names = ("x_ptr", "out_ptr", "factor", "SIZE")

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*, num_warps: int, num_stages: int, **arguments: Any) -> Any:
            self.calls.append(("found out", grid, tuple(arguments[name] for name in self.arg_names)))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: CompilingKernel):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.kernel.calls.append(("compiled", grid, values))


def test_a_repeated_launch_calls_the_compiled_kernel_where_that_fits() -> None:
    kernel, x, out = CompilingKernel(), torch.zeros(24), torch.zeros(24)
    repeated = RepeatedLaunch(Launch(kernel, (3, 1), {"factor": 0.5, "SIZE": 8, "out_ptr": out, "x_ptr": x}))
    given = [torch.zeros(28)[1:25], torch.zeros(24), torch.zeros(24), torch.zeros(28)[1:25]]
    for n_columns, tensor in enumerate(given, start=1):
        repeated.run(n_columns, {"x_ptr": tensor})
    assert [how for how, _, _ in kernel.calls] == ["found out", "found out", "compiled", "found out"]
    for n_columns, (_, grid, values) in enumerate(kernel.calls, start=1):
        assert grid == (3, n_columns, 1) and values[0] is given[n_columns - 1] and values[1] is out and values[2:] == (0.5, 8)


ON_A_GPU_THAT_NOTES = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from kernels.decode_mlp import decode_launches
from kernels.repeated_launch import RepeatedLaunch
from tests.kernels.random_moe import Sizes, poisoned, random_call

class Utils:
    def load_binary(self, *binary):
        return "module", "function", 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 17}

class Driver:
    utils = Utils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return "stream"

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            noted.append((metadata.name, metadata.num_warps, (x, y, z), stream, function, arguments))
        return launch

noted = []
driver.set_active(Driver())
call = random_call(Sizes(2, 64, 32, 5, 2), torch.bfloat16, 0, biases=True)
for launch in decode_launches(call, *poisoned(call)):
    repeated = RepeatedLaunch(launch)
    for seed in range(2):
        other = random_call(Sizes(2, 64, 32, 5, 2), torch.bfloat16, seed)
        tensors = {"ids_ptr": other.ids, "y_ptr": other.x.new_empty(4, 32)}
        repeated.run(3, tensors)
        repeated._changed((launch.grid[0], 3, 1), tensors).run()
        (*ours, given), (*theirs, wanted) = noted[-2:]
        assert ours == theirs and len(given) == len(wanted), (ours, theirs)
        assert all(mine is its or mine == its for mine, its in zip(given, wanted)), (given, wanted)
print(len(noted))
"""


def test_triton_gives_its_launcher_what_it_would_give_it_by_the_long_way(tmp_path: Path) -> None:
    """Triton itself, of the version that is installed, up to the driver's launch; in a process in which it does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ON_A_GPU_THAT_NOTES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "8"
