"""The parts of the check, in the order of what depends on them most: a short stay at a GPU has the first ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from kernels.quantised import QuantFormat
from prefetch.transfers.cuda_driver import CudaDriver
from scripts.gpu.bundled_tokens import device_driven_tokens, host_driven_tokens, rehearse_device_driven
from scripts.gpu.compile_ahead import Rehearsal, compile_ahead, programs_of, target_of
from scripts.gpu.correctness import SMALL, Verdict, rehearse_verdicts, verdicts
from scripts.gpu.decode_model import DECODE_SHAPES, DecodeShape
from scripts.gpu.decode_scene import RECALL, Machine, Setting
from scripts.gpu.device_facts import copy_rate
from scripts.gpu.forked import Row, Work
from scripts.gpu.kernel_times import KernelTime, kernel_times, rehearse_kernel_times
from scripts.gpu.offloaded_decode import decode_speeds, rehearse_decode
from scripts.gpu.operation_times import (
    operation_times,
    operation_verdicts,
    rehearse_operation_times,
    rehearse_operation_verdicts,
)
from scripts.gpu.operations import operations
from scripts.gpu.providers import PEERS
from scripts.gpu.shapes import SHAPES, TOKENS
from scripts.gpu.thread_transfers import thread_transfer_rates
from scripts.gpu.transfers import rehearse_transfer_rates, transfer_rates
from scripts.gpu.variants import rehearse_variants, variant_verdicts

DTYPE = torch.bfloat16
PROVIDER_TOKENS, OPERATION_TOKENS = (1, 40), (1, 5)  # of correctness
OPERATION_SHAPES = SMALL[1:2]
PLAN_SHAPES = (*OPERATION_SHAPES, SHAPES[0])  # the planner's programs depend on the number of slots: a real model's too
FIRST = (("Qwen3-30B-A3B", 1), ("Qwen3-30B-A3B", 8), ("Qwen3-30B-A3B", 64), ("Mixtral-8x7B", 1), ("Qwen3.6-35B-A3B", 1))
CARD_BYTES = 12_000_000_000  # of the card that offloaded decoding stands in for
CARD_RESERVE_BYTES = 1_000_000_000  # what is not PyTorch's on a card that has no more
INT4 = QuantFormat("int4", 64)
DECODED = ((DECODE_SHAPES[0], INT4), (DECODE_SHAPES[0], None), (DECODE_SHAPES[1], INT4), (DECODE_SHAPES[1], None))


@dataclass(frozen=True)
class Section:
    """A part of the check: its key in the JSON, what yields its rows in a process of its own, and how long that may take."""

    name: str
    run: Work
    limit_s: float
    rehearse: Rehearsal | None = None  # launches what `run` will launch, without a GPU


def sections() -> list[Section]:
    """All of them, in order."""
    later = [(s.name, n) for s in SHAPES for n in TOKENS if (s.name, n) not in FIRST]
    return [
        *_correctness(),
        Section("tokens device-driven", device_driven_tokens, 60, rehearse_device_driven),
        Section("copy rate", copy_rate, 20),
        Section("transfers", _transfers, 60, _rehearse_transfers),
        *(_kernels(*case) for case in FIRST),
        *(_decode(shape, how) for shape, how in DECODED),
        *(_kernels(*case) for case in later),
        Section("tokens host-driven", host_driven_tokens, 70),
    ]


def compiling(to_do: list[Section], capability: tuple[int, int]) -> Section:
    """What compiles the programs of `to_do` first, in their order."""

    def run(end_s: float) -> Iterator[Row]:
        launches, problems = programs_of(section.rehearse for section in to_do if section.rehearse is not None)
        for row in compile_ahead(launches, target_of(capability)):
            yield row | {"problems": problems + row["problems"]}

    return Section("programs", run, 90)


def _correctness() -> list[Section]:
    experts = Section(
        "correctness experts",
        lambda end_s: _judged(verdicts("cuda", tokens=PROVIDER_TOKENS)),
        90,
        partial(rehearse_verdicts, SMALL, PROVIDER_TOKENS),
    )
    variants = Section("correctness variants", lambda end_s: _judged(variant_verdicts("cuda")), 60, rehearse_variants)
    return [experts, variants, *(_operation_correctness(name) for name in operations())]


def _operation_correctness(name: str) -> Section:
    shapes = PLAN_SHAPES if name == "cache_plan" else OPERATION_SHAPES
    return Section(
        f"correctness {name}",
        lambda end_s: _judged(operation_verdicts(name, "cuda", shapes, OPERATION_TOKENS)),
        40,
        partial(rehearse_operation_verdicts, name, shapes, OPERATION_TOKENS),
    )


def _judged(found: Iterator[Verdict]) -> Iterator[Row]:
    for verdict in found:
        yield asdict(verdict) | {"passed": verdict.passed, "ours": verdict.provider not in PEERS}


def _kernels(model: str, n_tokens: int) -> Section:
    shape = next(shape for shape in SHAPES if shape.name == model)

    def run(end_s: float) -> Iterator[Row]:
        for times in (kernel_times, operation_times):
            torch.cuda.empty_cache()  # the experts' weights
            yield from map(_row, times(shape, n_tokens, DTYPE))

    def rehearse() -> None:
        rehearse_kernel_times(shape, n_tokens, DTYPE)
        rehearse_operation_times(shape, n_tokens, DTYPE)

    return Section(f"kernels {model} T={n_tokens}", run, 60, rehearse)


def _row(time: KernelTime) -> Row:
    return asdict(time) | {"right": time.right, "share_of_roof": time.share_of_roof}


def _transfers(end_s: float) -> Iterator[Row]:
    torch.cuda.init()
    device = torch.device("cuda", 0)
    torch.cuda.synchronize()  # makes PyTorch's context current, which the driver's calls need
    yield from (asdict(rate) for rate in thread_transfer_rates(SHAPES[0], DTYPE, device, CudaDriver()))
    for shape in SHAPES:
        yield from (asdict(rate) for rate in transfer_rates(shape, DTYPE))


def _rehearse_transfers() -> None:
    for shape in SHAPES:
        rehearse_transfer_rates(shape, DTYPE)


def _decode(shape: DecodeShape, how: QuantFormat | None) -> Section:
    def run(end_s: float) -> Iterator[Row]:
        torch.cuda.synchronize()
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        setting = Setting(shape, how, min(CARD_BYTES, total_bytes - CARD_RESERVE_BYTES))
        yield _told(setting)
        for speed in decode_speeds(Machine(torch.device("cuda", 0)), setting, end_s - STOP_S):
            yield asdict(speed)

    return Section(
        f"decode {shape.moe.name} {how or 'bfloat16'}", run, 110, lambda: rehearse_decode(Setting(shape, how, CARD_BYTES))
    )


STOP_S = 15.0  # a repeat under way, and what comes after it


def _told(setting: Setting) -> Row:
    """What a reader must know of a comparison."""
    return {
        "setting": asdict(setting) | {"dtype": str(setting.dtype), "how": setting.experts},
        "recall": RECALL,
        "device_guesses": setting.device_guesses,
        "guesses": "replayed: every arm computes a predictor's head beside the router, none carries its scores to the host",
    }
