"""What launchers refuse before anything runs: tensors a kernel would misread, machines and compilers it cannot trust."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kernels.launch import (
    ALIGNMENT_BYTES,
    KNOWN_FAULTS,
    OLDEST_TRITON,
    Launch,
    RepeatedLaunch,
    check_aligned,
    check_at_most,
    check_launchable,
    check_miscompiled,
    check_tensor,
    triton_version,
)
from prefetch.errors import KernelInputError

CPU = torch.device("cpu")


@triton.jit
def _scale_kernel(x_ptr, out_ptr, factor, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at) * factor)


def test_a_launch_runs_every_program_of_its_grid() -> None:
    x, out = torch.arange(24.0), torch.full((24,), torch.nan)
    Launch(_scale_kernel, (3,), {"x_ptr": x, "out_ptr": out, "factor": 0.5, "SIZE": 8}).run()
    assert torch.equal(out, x / 2)


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


@pytest.mark.parametrize(
    ("tensor", "expected", "message"),
    [
        (torch.zeros(2, 3), {"shape": [3, 2]}, "w has shape [2, 3], expected [3, 2]"),
        (torch.zeros(2, 3), {"shape": [None, 4]}, "w has shape [2, 3], expected [any, 4]"),
        (torch.zeros(6), {"shape": [2, 3]}, "w has shape [6], expected [2, 3]"),
        (torch.zeros(2, 0), {"shape": [2, None]}, "w has shape [2, 0]: no size may be 0"),
        (torch.zeros(2, 3).half(), {}, "w is float16, expected float32"),
        (torch.zeros(2, 3), {"dtypes": [torch.int32, torch.int64]}, "w is float32, expected int32 or int64"),
        (torch.zeros(2, 3, device="meta"), {}, "w is on meta, expected cpu like the other arguments"),
        (torch.zeros(3, 2).T, {}, "w has strides [1, 2] for shape [2, 3]: make it contiguous()"),
        (torch.zeros(2, 6)[:, ::2], {"contiguous_dims": 1}, "w has strides [6, 2] for shape [2, 3]: make it contiguous()"),
    ],
)
def test_tensors_that_are_refused(tensor: torch.Tensor, expected: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"shape": [2, 3], "dtypes": [torch.float32], "device": CPU, **expected}
    with pytest.raises(KernelInputError, match=f"^{re.escape(message)}$"):
        check_tensor("w", tensor, **arguments)


@pytest.mark.parametrize(
    ("tensor", "contiguous_dims"),
    [
        pytest.param(torch.zeros(2, 3), None, id="plain"),
        pytest.param(torch.zeros(2, 5)[:, :3], 1, id="rows apart"),
        pytest.param(torch.zeros(4, 3)[::2], 1, id="every second row"),
        pytest.param(torch.zeros(3).expand(2, 3), 1, id="one row seen twice"),
        pytest.param(torch.zeros(2, 6)[:, ::2], 0, id="any strides"),
    ],
)
def test_tensors_that_pass(tensor: torch.Tensor, contiguous_dims: int | None) -> None:
    check_tensor("w", tensor, [2, None], [torch.float32], CPU, contiguous_dims)


def test_strides_of_single_rows_do_not_matter() -> None:
    check_tensor("w", torch.zeros(2, 9)[:1], [1, 9], [torch.float32], CPU)
    check_tensor("w", torch.zeros(9, 2)[:, :1].T[:, :1], [1, 1], [torch.float32], CPU)


@pytest.mark.parametrize("offset", range(1, 2 * ALIGNMENT_BYTES))
def test_alignment_is_judged_by_the_byte(offset: int) -> None:
    memory = torch.zeros(64 + ALIGNMENT_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT_BYTES + offset
    if offset % ALIGNMENT_BYTES:
        with pytest.raises(KernelInputError, match=f"w starts {offset % ALIGNMENT_BYTES} bytes past a multiple of 16: clone"):
            check_aligned("w", memory[start : start + 1])
    else:
        check_aligned("w", memory[start : start + 1])


def test_meta_tensors_have_no_address_to_judge() -> None:
    check_aligned("w", torch.empty(8, device="meta")[1:])


def test_counts_outside_their_range_are_refused() -> None:
    for good in (1, 8):
        check_at_most("k", good, "n_experts", 8)
    for bad in (0, 9, -1):
        with pytest.raises(KernelInputError, match=f"^k = {bad} must be between 1 and n_experts = 8$"):
            check_at_most("k", bad, "n_experts", 8)


def test_the_cpu_is_refused_unless_triton_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launchable(CPU)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(KernelInputError, match=r"need CUDA tensors; call the \*_reference function .* TRITON_INTERPRET=1"):
        check_launchable(CPU)


@pytest.mark.parametrize("kind", ["meta", "xpu"])
def test_other_devices_are_refused(kind: str) -> None:
    with pytest.raises(KernelInputError, match=f"the tensors are on '{kind}': Triton kernels need CUDA tensors"):
        check_launchable(torch.device(kind))


@pytest.mark.parametrize(
    ("text", "numbers"), [("3.7.1", (3, 7, 1)), ("3.6.0+git9844da95", (3, 6, 0)), ("3.8.0.post1", (3, 8, 0)), ("3.10", (3, 10))]
)
def test_versions(text: str, numbers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", text)
    assert triton_version() == numbers


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(KernelInputError, match=r"triton 3\.5\.1 is too old for these kernels: install 3\.6 or newer"):
        check_launchable(CPU)


@pytest.mark.parametrize(
    ("version", "capability", "trait", "refused"),
    [
        ((3, 3, 1), 9, "register_wgmma", False),
        ((3, 4, 0), 9, "register_wgmma", True),
        ((3, 9, 0), 9, "register_wgmma", True),
        ((3, 10), 9, "register_wgmma", False),
        ((3, 7, 1), 8, "register_wgmma", False),
        ((3, 7, 1), 10, "register_wgmma", False),
        ((3, 7, 0), 9, "chained_wgmma", False),
        ((3, 7, 1), 9, "chained_wgmma", True),
        ((3, 7, 2), 9, "chained_wgmma", False),
        ((3, 7, 1), 9, "no such trait", False),
    ],
)
def test_known_faults(version: tuple[int, ...], capability: int, trait: str, refused: bool) -> None:
    if not refused:
        check_miscompiled(version, capability, [trait])
        return
    shown = re.escape(".".join(map(str, version)))
    with pytest.raises(KernelInputError, match=rf"triton {shown} is known to miscompile .* capability 9\.x \(.*triton #\d+\)"):
        check_miscompiled(version, capability, [trait])


def test_a_kernel_without_traits_is_never_refused() -> None:
    for version in (OLDEST_TRITON, (3, 7, 1), (3, 9)):
        check_miscompiled(version, 9, [])


def test_every_known_fault_ends_and_is_of_a_triton_that_is_allowed() -> None:
    for first, fixed, capability, trait, source in KNOWN_FAULTS:
        assert first < fixed and fixed > OLDEST_TRITON
        with pytest.raises(KernelInputError, match=re.escape(source)):
            check_miscompiled(max(first, OLDEST_TRITON), capability, [trait])
