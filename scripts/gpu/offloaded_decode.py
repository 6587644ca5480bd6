"""Offloaded decoding at real dimensions: what prefetching brings where a card holds a part of the experts.

Real transfers, kernels, caches and dense work; weights and routing are generated, and guesses are right as often as those of the
predictor that they stand for. So tokens/s are measured, for a routing that has the stated statistics.

Arms: SLRU without prefetch, gate reuse, an oracle, and with all experts resident. Driven by the host (copy engine) or by the device
(one CUDA graph a token, copies by kernels).
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import torch

from experiments.statistics import spread
from prefetch.slots import SlotPool
from prefetch.transfers.pinned import PinnedSource, SlotFences
from prefetch.transfers.threads import ThreadTransfers
from scripts.gpu.decode_arms import N_THREADS, Arm, DeviceArm, GeneratedSource, HostArm, ResidentArm
from scripts.gpu.decode_scene import RECALL, Machine, Scene, Setting

CHUNK_BYTES = 2 << 20


@dataclass(frozen=True)
class ArmSpeed:
    """One arm of one comparison. Times are medians over the repeats; None = not measured, and `skipped` says why."""

    model: str
    experts: str  # "bfloat16" or the quantised format
    driven_by: str  # "host" | "device" | "nobody": all resident
    arm: str
    n_slots: int
    tokens_per_s: float | None = None
    lowest: float | None = None
    highest: float | None = None
    hit_rate: float | None = None  # useful prefetches that had arrived among them
    moved_bytes_per_token: float | None = None
    stall_s_per_token: float | None = None  # host-driven: waited for; device-driven: longer than with all resident
    skipped: str | None = None


def decode_speeds(machine: Machine, setting: Setting) -> Iterator[ArmSpeed]:
    """Every arm of one comparison: device-driven ones interleaved, then host-driven ones, then the bound."""
    scene = Scene.make(machine, setting)
    names = ("slru", *RECALL)
    n_slots = scene.n_slots()
    with ExitStack() as stack:
        source = stack.enter_context(closing(GeneratedSource(scene, machine.driver())))
        slots = SlotPool(setting.geometry, n_slots, machine.device).rows
        device_driven = _measured(scene, [DeviceArm(scene, name, slots, source) for name in names])
        del slots
        gc.collect()  # the pool's memory, so that the next one finds room under the cap
        host_driven = _measured(scene, _host_arms(scene, names, n_slots, source, stack))
    bound = _resident(scene)
    for speed in device_driven:
        yield _with_stall(speed, bound)
    yield from (*host_driven, bound)


def _host_arms(scene: Scene, names: Sequence[str], n_slots: int, source: PinnedSource, stack: ExitStack) -> list[Arm]:
    """One pool and its transfers, in turn; `stack` closes them."""
    machine = scene.machine
    fences = stack.enter_context(closing(SlotFences(source.driver, n_slots, machine.compute_stream)))
    pool = SlotPool(scene.setting.geometry, n_slots, machine.device, on_release=fences.raise_at)
    transfers = ThreadTransfers(
        source, pool.buffer, n_threads=N_THREADS, chunk_bytes=CHUNK_BYTES, slot_address=pool.address, fence=fences.event
    )
    stack.enter_context(closing(transfers))
    return [HostArm(scene, name, pool, transfers) for name in names]


def _resident(scene: Scene) -> ArmSpeed:
    geometry = scene.setting.geometry
    if scene.machine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
        free_bytes, _ = torch.cuda.mem_get_info()
        if geometry.total_bytes > 0.95 * free_bytes:
            reason = f"all experts take {geometry.total_bytes / 1e9:.0f} GB, {free_bytes / 1e9:.0f} GB are free"
            return ArmSpeed(*_labels(scene), "nobody", "resident", geometry.n_total, skipped=reason)
    return _measured(scene, [ResidentArm(scene)])[0]


def _measured(scene: Scene, arms: list[Arm]) -> list[ArmSpeed]:
    """Interleaved repeats, each from empty caches; the arms must agree in the last token's logits."""
    setting = scene.setting
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    tallies = {}
    for _, arm in itertools.product(range(setting.n_repeats), arms):
        arm.restart()
        for index in range(setting.n_warmup):
            arm.token(index)
        before = arm.tally()
        began_s = time.perf_counter()
        for index in range(setting.n_warmup, setting.n_warmup + setting.n_tokens):
            arm.token(index)
        scene.machine.wait()
        times[arm.name].append(time.perf_counter() - began_s)
        tallies[arm.name] = before, arm.tally()
        arm.finish()
    for arm in arms[1:]:
        if arm.out is None or arms[0].out is None or not torch.equal(arm.out, arms[0].out):
            raise AssertionError(f"arm {arm.name} computed other logits than arm {arms[0].name}: please report it")
    return [_speed(scene, arm, times[arm.name], *tallies[arm.name]) for arm in arms]


def _speed(scene: Scene, arm: Arm, times: list[float], before: tuple, after: tuple) -> ArmSpeed:
    n_tokens = scene.setting.n_tokens
    rates = spread([n_tokens / seconds for seconds in times])
    needed, hits, moved = (after[i] - before[i] for i in range(3))
    stall_s = None if after[3] is None else (after[3] - before[3]) / n_tokens
    return ArmSpeed(
        *_labels(scene), arm.driven_by, arm.name, arm.n_slots,
        rates.median, rates.low, rates.high, hits / needed, moved / n_tokens, stall_s,
    )  # fmt: skip


def _with_stall(speed: ArmSpeed, bound: ArmSpeed) -> ArmSpeed:
    if speed.tokens_per_s is None or bound.tokens_per_s is None:
        return speed
    return replace(speed, stall_s_per_token=1 / speed.tokens_per_s - 1 / bound.tokens_per_s)


def _labels(scene: Scene) -> tuple[str, str]:
    setting = scene.setting
    return setting.shape.moe.name, str(setting.dtype).removeprefix("torch.") if setting.how is None else str(setting.how)
