"""Loads in flight, counted in machine code written by hand."""

from __future__ import annotations

import pytest

from kernels.loads_in_flight import cuda_loads_in_flight, hip_loads_in_flight


def sass(*code: str) -> str:
    return "\n".join(f"        /*{16 * index:04x}*/                   {text} ;  /* 0x0 */" for index, text in enumerate(code))


LOAD_4, LOAD_8 = "@P0 LDG.E.EF.128 R4, [R2.64]", "LDG.E.128.CONSTANT R8, desc[UR4][R2.64]"
USE_4, USE_8 = "FFMA R20, R5, R1, R20", "STS.128 [R30], R8"
AGAIN, END = "@P1 BRA 0x10", "EXIT"


@pytest.mark.parametrize(
    ("code", "n_loads"),
    [
        pytest.param(["NOP", LOAD_4, LOAD_8, USE_4, USE_8, AGAIN, END], 2, id="both before the first use"),
        pytest.param(["NOP", LOAD_4, USE_4, LOAD_8, USE_8, AGAIN, END], 1, id="each at its use"),
        pytest.param(["NOP", LOAD_4, LOAD_4, USE_4, AGAIN, END], 1, id="to the same registers"),
        pytest.param(["NOP", USE_4, LOAD_4, USE_8, LOAD_8, AGAIN, END], 2, id="carried to the next round"),
        pytest.param(["NOP", LOAD_4, "LDG.E R1, [R2.64]", "FADD R1, R1, R1", LOAD_8, USE_4, USE_8, AGAIN, END], 1, id="a later wait"),
        pytest.param([LOAD_4, LOAD_8, "LDG.E.128 R12, [R2.64]", LOAD_4, USE_4, "BRA 0x40", END], 3, id="no loop but a trap"),
        pytest.param(["NOP", "LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64]", "FADD R1, R9, R1", AGAIN, END], 2, id="32 bytes at once"),
        pytest.param(["LDG.E R1, [R2.64]", "FADD R1, R1, R1", END], 0, id="narrow"),
    ],
)  # fmt: skip
def test_cuda(code: list[str], n_loads: int) -> None:
    assert cuda_loads_in_flight(sass(*code)) == n_loads


def test_the_loop_with_most_loads_is_the_one_that_counts() -> None:
    hot = [LOAD_4, LOAD_8, USE_4, USE_8, "@P1 BRA 0x60"]
    code = ["NOP", LOAD_4, "LDG.E.128 R12, [R2.64]", "LDG.E.128 R16, [R2.64]", "NOP", "NOP", *hot, END]
    assert cuda_loads_in_flight(sass(*code)) == 2


@pytest.mark.parametrize(("left", "n_loads"), [(0, 1), (1, 2)])
def test_hip(left: int, n_loads: int) -> None:
    code = f"""
        global_load_dwordx4 v[0:3], v[8:9], off
        global_load_dwordx4 v[0:3], v[8:9], off
        global_load_dwordx4 v[0:3], v[8:9], off
    .LBB0_1:
        global_load_dwordx4 v[0:3], v[8:9], off
        s_waitcnt vmcnt({left}) lgkmcnt(0)
        buffer_load_dwordx4 v[4:7], v8, s[0:3], 0 offen
        s_waitcnt vmcnt({left})
        s_cbranch_scc1 .LBB0_1
        s_endpgm"""
    assert hip_loads_in_flight("\n".join(line.strip() for line in code.splitlines())) == n_loads
