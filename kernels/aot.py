"""Compile every kernel ahead of time for GPUs that this machine need not have: `python -m kernels.aot`.

Every file of this folder that has `compile_cases()` is taken in. Launches that the JIT would compile to one program are
compiled once. Prints a table of what became of them, says what its code fails to satisfy, and then ends with status 1.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from multiprocessing import Pipe, get_context
from pathlib import Path

import triton
from rich.console import Console
from rich.table import Table
from triton.compiler import ASTSource

import kernels
from kernels.compile_case import CompileCase
from kernels.machine_code import PARTS, Report, compile_case, specialise, violations
from prefetch.errors import KernelInputError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description="Compile every kernel ahead of time.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="GPUs to compile for")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    chosen = parser.parse_args(arguments)
    try:
        reports, faults = compile_all(chosen.parts)
    except KernelInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 140).print(table(reports))
    if chosen.csv:
        write_csv(chosen.csv, reports)
    for fault in faults:
        print(fault, file=sys.stderr)
    return bool(faults)


def compile_all(parts: Sequence[str]) -> tuple[list[Report], list[str]]:
    """Reports of every distinct case on every part, and a sentence for each thing that is not as expected.

    Raises:
        KernelInputError: Triton is interpreting in this process, and so compiles nothing.
    """
    if triton.knobs.runtime.interpret:
        raise KernelInputError(
            "TRITON_INTERPRET is set: Triton compiles nothing in this process; unset it before Python starts"
        )
    jobs = [(index, part) for part in parts for index in range(len(distinct_cases()))]
    n_workers, context = len(os.sched_getaffinity(0)), get_context("spawn")
    with ProcessPoolExecutor(n_workers, context, initializer=_warm_up, initargs=(parts,)) as pool:
        found = list(pool.map(_compile, *zip(*jobs, strict=True), chunksize=4))
    cases = distinct_cases()
    faults = [problem for problem in found if isinstance(problem, str)]
    for (index, _), report in zip(jobs, found, strict=True):
        faults += violations(report, cases[index].expect) if isinstance(report, Report) else []
    return [report for report in found if isinstance(report, Report)], faults


@cache
def distinct_cases() -> list[CompileCase]:
    """The cases of every kernel file in order of file name, without those that compile to the same as an earlier one."""
    modules = [importlib.import_module(f"kernels.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)]
    cases = [case for module in modules if hasattr(module, "compile_cases") for case in module.compile_cases()]
    distinct: dict[str, CompileCase] = {}
    for case in cases:
        source, launch = specialise(case.launch), case.launch
        program = (launch.kernel.__module__, case.kernel_name, source.signature, source.constants, source.attrs)
        distinct.setdefault(repr((*program, launch.num_warps, launch.num_stages, case.expect)), case)
    return list(distinct.values())


@triton.jit
def _empty_kernel():  # type: ignore[no-untyped-def]
    pass


def _warm_up(parts: Sequence[str]) -> None:
    """Do once in a worker what each of its children would do again: import the code generator, hash all of Triton, ask ptxas
    for its version. That takes as long as a small case."""
    for part in parts:
        triton.compile(ASTSource(fn=_empty_kernel, signature={}), target=PARTS[part].target)


def _compile(index: int, part: str) -> Report | str:
    """The report, or why there is none. In a worker process, since launches do not travel: they are built again; and in a child of
    it, since a compiler that aborts would take the other cases with it."""
    receiver, sender = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            sender.send(compile_case(distinct_cases()[index], PARTS[part]))
        except Exception as error:  # whatever a compiler raises
            sender.send(f"{type(error).__name__}: {error}".splitlines()[0])
        finally:
            os._exit(0)
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = "the compiler aborted"
    os.waitpid(child, 0)
    if isinstance(found, Report):
        return found
    case = distinct_cases()[index]
    return f"{case.launch.kernel.__module__.removeprefix('kernels.')}.{case.kernel_name} {case.name} {part}: {found}"


def table(reports: Sequence[Report]) -> Table:
    """One line a report."""
    shown = Table(title=f"Triton {triton.__version__}: machine code per case (static instructions)")
    for name in asdict(reports[0]):
        shown.add_column(name.replace("_", " "), justify="left" if name in ("kernel", "case", "part") else "right")
    for report in reports:
        shown.add_row(*(str(value) for value in asdict(report).values()))
    return shown


def write_csv(path: Path, reports: Sequence[Report]) -> None:
    """All reports, complete under `path` or not there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, asdict(reports[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(report) for report in reports)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(text.getvalue(), encoding="utf-8")
    os.replace(aside, path)


if __name__ == "__main__":
    sys.exit(main())
