"""Programs compiled ahead are those that the JIT asks for later: it finds them in its cache. In a process where Triton compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import json, sys
import torch, triton
from kernels.launch import KernelInputError
from scripts.gpu import compile_ahead
from scripts.gpu.kernel_times import reader
from scripts.gpu.providers import PROVIDERS, make_problem
from scripts.gpu.shapes import MoEShape

shape = MoEShape("tiny", hidden=128, n_experts=8, top_k=2, intermediate=64, n_layers=2)
compile_ahead._build_launcher = lambda kernel: None  # needs the driver's library
built = []
triton.knobs.compilation.listener = lambda **event: built.append(event["cache_hit"])

def rehearse():
    problem = make_problem(shape, 1, torch.float16, "meta", 0)
    PROVIDERS["ours_decode"](problem)()
    PROVIDERS["ours"](problem)()  # the same two programs

def fails():
    rehearse()
    raise KernelInputError("no such path")

compile_ahead.settle_names()
from kernels import codes_in_registers, grouped_mlp  # one calls the other
settled = all(f.hash is not None for f in (codes_in_registers.multiply_codes, grouped_mlp._gate_up_kernel))

launches, problems = compile_ahead.programs_of([rehearse, fails])
target = compile_ahead.target_of((9, 0))
(row,) = compile_ahead.compile_ahead(launches, target)
for index in range(len(launches)):  # as the JIT does when it is called
    compile_ahead._compile(index)
print(json.dumps({"problems": problems, "row": row, "hits": built, "settled": settled}))
"""


def test_the_jit_finds_what_was_compiled_ahead(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["settled"]
    assert found["problems"] == ["rehearsal: KernelInputError: no such path"]
    assert (found["row"]["n_programs"], found["row"]["n_compiled"], found["row"]["problems"]) == (2, 2, [])
    assert found["row"]["target"] == "sm_90" and found["hits"] == [True, True]
