"""Every kernel compiled for real GPUs, in a process in which Triton does not interpret: what its machine code must satisfy."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from kernels.compile_case import Expectations
from kernels.machine_code import PARTS, Report, violations

REPOSITORY = Path(kernels.__file__).parents[1]
pytestmark = pytest.mark.timeout(1800)  # minutes on a slow machine: some hundreds of compilations


def run_python(*arguments: str, cache: Path, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(REPOSITORY)} | (
        {"TRITON_INTERPRET": "1"} if interpret else {}
    )
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """One row for each case and part; the command itself checks all that `violations` names."""
    folder = tmp_path_factory.mktemp("aot")
    done = run_python("-m", "kernels.aot", "--csv", str(folder / "kernels.csv"), cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    with (folder / "kernels.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_kernel_file_with_cases_is_compiled_for_every_part(compiled: list[dict[str, str]]) -> None:
    offering = {path.stem for path in (REPOSITORY / "kernels").glob("*.py") if "def compile_cases(" in path.read_text()}
    assert offering >= {"decode_mlp", "grouped_mlp"}
    for part in PARTS:
        # A file's cases may use another file's kernels as well; its own must be among them.
        assert offering <= {row["kernel"].split(".")[0] for row in compiled if row["part"] == part}


def test_every_model_and_dtype_of_the_expert_kernels_is_compiled(compiled: list[dict[str, str]]) -> None:
    wanted = {("Qwen3-30B-A3B", dtype) for dtype in ("bf16", "fp16", "fp32")}
    wanted |= {("Mixtral-8x7B", "bf16"), ("gpt-oss-20b", "bf16")}
    for file in ("decode_mlp", "grouped_mlp"):
        for kernel in ("gate_up_kernel", "down_kernel"):
            cases = [row["case"].split(" ") for row in compiled if row["kernel"] == f"{file}.{kernel}"]
            assert {(model, dtype) for model, _, dtype, *_ in cases} == wanted


def test_what_the_machine_code_satisfies(compiled: list[dict[str, str]]) -> None:
    """Read from the table, independently of the command's own verdict."""
    shared_limits = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
    for row in compiled:
        assert int(row["spill_bytes"]) == 0, row
        assert int(row["shared_bytes"]) <= shared_limits[row["part"]], row
        if row["kernel"].startswith("decode_mlp."):
            assert int(row["registers"]) <= 128 and int(row["wide_loads"]) > 0, row
            least = 0 if "fp32" in row["case"] else 4 if row["part"] == "gfx942" else 8  # gfx942's warps have 64 lanes
            assert int(row["loads_in_flight"]) >= least, row
        if row["kernel"].startswith("decode_quantised.") and row["part"] != "gfx942":
            assert int(row["loads_in_flight"]) >= 4, row
        if row["kernel"] in ("grouped_mlp.gate_up_kernel", "grouped_mlp.down_kernel") and "fp32" not in row["case"]:
            assert int(row["tensor_core_instructions"]) > 0 and int(row["wide_loads"]) > 0, row


def test_no_wgmma_on_codes_has_an_operand_in_registers(tmp_path: Path) -> None:
    """ptxas up to 12.9 breaks those. Such an operand is a second list of registers, after the accumulators'."""
    script = """
import torch, triton
from kernels.compile_case import meta_outputs, quantised_calls
from kernels.grouped_mlp import grouped_launches
from kernels.machine_code import PARTS, specialise
for name, call in list(quantised_calls(tokens=(512,)))[:5]:
    for launch in grouped_launches(call, *meta_outputs(call))[1:3]:
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        ptx = triton.compile(specialise(launch), target=PARTS["sm_90"].target, options=options).asm["ptx"]
        found = [line for line in ptx.split(";") if "wgmma.mma_async" in line]
        print(len(found), max(line.count("{") for line in found))
"""
    done = run_python("-c", script, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    counts = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(counts) == 10 and all(n_wgmma > 0 and n_lists == 1 for n_wgmma, n_lists in counts)


def test_each_fault_is_reported() -> None:
    good = Report("k", "c", "gfx942", num_warps=4, registers=128, spill_bytes=0, shared_bytes=65536, wide_loads=1, loads_in_flight=4, tensor_core_instructions=1)  # fmt: skip
    strict = Expectations(max_registers=128, wide_loads=True, kilobytes_in_flight=16, tensor_cores=True)
    assert violations(good, strict) == []
    bad = Report("k", "c", "gfx942", num_warps=4, registers=129, spill_bytes=4, shared_bytes=65537, wide_loads=0, loads_in_flight=3, tensor_core_instructions=0)  # fmt: skip
    assert violations(bad, strict) == [
        "k c gfx942: spills 4 bytes",
        "k c gfx942: 129 registers > 128",
        "k c gfx942: 65537 bytes of shared memory > 65536",
        "k c gfx942: no 16-byte loads",
        "k c gfx942: 12288 bytes of loads in flight < 16384",
        "k c gfx942: no tensor-core instructions",
    ]


def test_a_kernel_that_spills_is_caught(tmp_path: Path) -> None:
    done = run_python("tests/kernels/spilling_kernel.py", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "spilling_kernel 256 values a thread sm_90: spills" in done.stdout


def test_an_interpreting_process_is_refused(tmp_path: Path) -> None:
    done = run_python("-m", "kernels.aot", cache=tmp_path, interpret=True)
    assert done.returncode == 2 and done.stderr.startswith("error: TRITON_INTERPRET is set")
