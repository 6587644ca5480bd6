"""Compile one launch for a GPU that this machine need not have, and read what became of it.

The launch was built by its kernel's own launcher from meta tensors, so what is compiled is what would run. Needs a process
in which Triton is not interpreting.
Source of the counts: `cuobjdump -res-usage -sass` (it is in the Triton wheel) for CUDA, the assembly text for HIP.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.compile_case import CompileCase, Expectations
from kernels.launch import Launch
from kernels.loads_in_flight import cuda_loads_in_flight, hip_loads_in_flight

TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Part:
    """A GPU to compile for."""

    name: str
    target: GPUTarget
    shared_limit_bytes: int  # per program; nothing fails at compile time when exceeded

    @property
    def is_cuda(self) -> bool:
        return self.target.backend == "cuda"


PARTS = {
    part.name: part
    for part in (
        Part("sm_80", GPUTarget("cuda", 80, 32), 163 << 10),
        Part("sm_90", GPUTarget("cuda", 90, 32), 227 << 10),
        Part("sm_100", GPUTarget("cuda", 100, 32), 227 << 10),
        Part("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10),
    )
}


@dataclass(frozen=True)
class Report:
    """What the compiler made of one case on one part. Counts are static instructions; `loads_in_flight` are 16-byte loads of a thread."""

    kernel: str
    case: str
    part: str
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    wide_loads: int
    loads_in_flight: int
    tensor_core_instructions: int

    @property
    def bytes_in_flight(self) -> int:
        """Of a program."""
        return 16 * self.loads_in_flight * self.num_warps * PARTS[self.part].target.warp_size


def compile_case(case: CompileCase, part: Part) -> Report:
    """Compile one case for one part and count. Raises Triton's own errors if it does not compile."""
    compiled = triton.compile(
        specialise(case.launch),
        target=part.target,
        options={"num_warps": case.launch.num_warps, "num_stages": case.launch.num_stages},
    )
    return Report(
        kernel=f"{case.launch.kernel.__module__.removeprefix('kernels.')}.{case.kernel_name}",
        case=case.name,
        part=part.name,
        num_warps=case.launch.num_warps,
        shared_bytes=compiled.metadata.shared,
        **(_count_cuda(compiled, part) if part.is_cuda else _count_hip(compiled)),
    )


def violations(report: Report, expect: Expectations) -> list[str]:
    """Sentences on what the machine code should satisfy and does not; empty when all is well."""
    limit = PARTS[report.part].shared_limit_bytes
    faults = [
        (report.spill_bytes > 0, f"spills {report.spill_bytes} bytes"),
        (report.registers > expect.max_registers, f"{report.registers} registers > {expect.max_registers}"),
        (report.shared_bytes > limit, f"{report.shared_bytes} bytes of shared memory > {limit}"),
        (expect.wide_loads and not report.wide_loads, "no 16-byte loads"),
        (
            report.bytes_in_flight < 1024 * expect.kilobytes_in_flight,
            f"{report.bytes_in_flight} bytes of loads in flight < {1024 * expect.kilobytes_in_flight}",
        ),
        (expect.tensor_cores and not report.tensor_core_instructions, "no tensor-core instructions"),
    ]
    return [f"{report.kernel} {report.case} {report.part}: {fault}" for wrong, fault in faults if wrong]


def specialise(launch: Launch) -> ASTSource:
    """The source that the JIT would compile for these arguments: its own inference of types and divisibility by 16."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    divisible: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = _type_name(value)
        if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            divisible[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=divisible)


def _type_name(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPE_NAMES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"cannot be a kernel argument: {value!r}")


def _count_cuda(compiled: Any, part: Part) -> dict[str, int]:
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        cuobjdump = Path(get_ptxas(part.target.arch).path).with_name("cuobjdump")
        dump = _run([str(cuobjdump), "-res-usage", "-sass", cubin.name])
    return {
        "registers": int(_first(r"\bREG:(\d+)", dump)),
        "spill_bytes": int(_first(r"\bSTACK:(\d+)", dump)),  # Triton puts nothing else on the stack
        "wide_loads": len(re.findall(r"\bLDG\.E\S*\.(?:128|256)|\bLDGSTS\.E\S*\.128|\bUBLKCP|\bUTMALDG", dump)),
        "loads_in_flight": cuda_loads_in_flight(dump),
        "tensor_core_instructions": len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|QMMA|IMMA|IGMMA|UTC\w*MMA)\b", dump)),
    }


def _count_hip(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]
    return {
        "registers": int(_first(r"\.vgpr_count:\s+(\d+)", text)),
        "spill_bytes": 4 * int(_first(r"\.vgpr_spill_count:\s+(\d+)", text)),
        "wide_loads": len(re.findall(r"(?:global|buffer|flat)_load_dwordx4", text)),
        "loads_in_flight": hip_loads_in_flight(text),
        "tensor_core_instructions": text.count("v_mfma"),
    }


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no '{pattern}': this Triton release reports differently\n{text[:500]}")
    return found.group(1)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout + done.stderr
