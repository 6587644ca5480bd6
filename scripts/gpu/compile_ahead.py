"""Compile every Triton program of the check before it is needed, on all cores: one by one they would take minutes of the GPU's time.

The programs are those that the sections launch when they are led over tensors without memory. Compiling needs no GPU: workers have
a stand-in for Triton's driver that only says for what to compile, so that the JIT's own code computes the names in its cache. A
program that is missing here, or fails, is compiled when it is needed.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

from triton.backends.compiler import GPUTarget
from triton.runtime.cache import triton_key
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import kernels
from kernels.launch import Launch, recorded_launches
from kernels.machine_code import specialise
from scripts.gpu.forked import Row, first_line

Rehearsal = Callable[[], None]  # launches what a section will launch, on meta tensors

_launches: list[Launch] = []  # of the workers, which are forked from the process that has recorded them


@dataclass(frozen=True)
class CompileOnly:
    """What the JIT asks of a driver before it compiles."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def settle_names() -> None:
    """Let Triton hash the source of every kernel now, before processes are forked that must agree on the names in its cache.

    Its hash of a kernel holds the constants of functions that it calls only if those were hashed earlier, through another kernel: two
    processes that begin with different kernels have different names for one program. Its hash of itself is in every name too, and
    takes each process a second of reading 400 MB unless it has it from here.
    """
    triton_key()
    for found in pkgutil.iter_modules(kernels.__path__):
        for function in vars(importlib.import_module(f"kernels.{found.name}")).values():
            if isinstance(function, JITFunction):
                _ = function.cache_key


def target_of(capability: tuple[int, int]) -> GPUTarget:
    """For a CUDA device of that compute capability."""
    return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)


def programs_of(rehearsals: Iterable[Rehearsal]) -> tuple[list[Launch], list[str]]:
    """A launch of each distinct program, in order of need, and why a rehearsal failed. In a process that interprets nothing."""
    distinct: dict[str, Launch] = {}
    problems = []
    for rehearse in rehearsals:
        with recorded_launches() as launches:
            try:
                rehearse()
            except Exception as failure:  # its programs are compiled when they are needed
                problems.append(f"rehearsal: {first_line(failure)}")
        for launch in launches:
            source = specialise(launch)
            program = launch.kernel.__module__, launch.kernel.__name__, source.signature, source.constants, source.attrs
            distinct.setdefault(repr((*program, launch.num_warps, launch.num_stages)), launch)
    return list(distinct.values()), problems


def compile_ahead(launches: list[Launch], target: GPUTarget) -> Iterator[Row]:
    """Compile all into Triton's cache, in order; a row of what became of them."""
    began_s = time.monotonic()
    _launches[:] = launches
    driver.set_active(CompileOnly(target))
    seconds, problems = {}, []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("fork")) as pool:
        futures: dict[Future[float], int] = {pool.submit(_compile, index): index for index in range(len(launches))}
        for future in as_completed(futures):
            launch = launches[futures[future]]
            name = f"{launch.kernel.__module__.removeprefix('kernels.')}.{launch.kernel.__name__.strip('_')}"
            try:
                seconds[futures[future]] = (future.result(), name)
            except BrokenProcessPool:
                problems.append("a compiler aborted and took the others with it")
                break
            except Exception as failure:
                problems.append(f"{name}: {first_line(failure)}")
    slowest = sorted(seconds.values(), reverse=True)[:5]
    yield {
        "target": f"sm_{target.arch}",
        "n_programs": len(launches),
        "n_compiled": len(seconds),
        "wall_s": time.monotonic() - began_s,
        "cpu_s": sum(spent for spent, _ in seconds.values()),
        "slowest": [f"{name} {spent:.1f} s" for spent, name in slowest],
        "problems": problems,
    }


def _compile(index: int) -> float:
    """In a worker; returns seconds."""
    began_s = time.monotonic()
    launch = _launches[index]
    kernel = launch.kernel.warmup(
        **launch.arguments, grid=launch.grid, num_warps=launch.num_warps, num_stages=launch.num_stages
    )
    _build_launcher(kernel)
    return time.monotonic() - began_s


def _build_launcher(kernel: object) -> None:
    """The C function that passes the arguments is compiled too, one for each signature."""
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(kernel.src, kernel.metadata)  # type: ignore[attr-defined]
