"""Offloaded decoding at real dimensions: what prefetching brings where a card holds a part of the experts.

Real transfers, kernels, caches and dense work; weights and routing are generated, and guesses are right as often as those of the
predictor that they stand for. So tokens/s are measured, for a routing that has the stated statistics. Guesses are replayed: every arm
computes a predictor's head beside the router, but no arm carries its scores to the host.

Arms: all experts resident; SLRU and LRU without prefetch; gate reuse and an oracle over the better of the two. Driven by the host (copy
engine) or by the device (one CUDA graph a token, copies by kernels).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import torch

from experiments.statistics import spread
from kernels.moe_call import MoECall
from kernels.quantised_experts import expert_table
from prefetch.geometry import ExpertKey
from prefetch.slots import SlotPool
from prefetch.transfers.pinned import PinnedSource, SlotFences
from prefetch.transfers.threads import ThreadTransfers
from scripts.gpu.decode_arms import N_THREADS, Arm, DeviceArm, GeneratedSource, HostArm, Kind, ResidentArm, Tally, kinds
from scripts.gpu.decode_scene import Machine, Scene, Setting
from scripts.gpu.forked import first_line
from scripts.gpu.parts import computed_in_parts

CHUNK_BYTES = 2 << 20


MOST_DEVICE_SLOTS = 4096  # of a device-driven cache: the planner's books spill with 8,192
DEVICE_SHARE = 0.5  # of the time that is left, for the device-driven arms


@dataclass(frozen=True)
class ArmSpeed:
    """One arm of one comparison. Times are medians over the repeats; None = not measured, and `skipped` says why."""

    model: str
    experts: str  # "bfloat16" or the quantised format
    driven_by: str  # "host" | "device" | "nobody": all resident
    arm: str
    policy: str
    n_slots: int
    tokens_per_s: float | None = None
    lowest: float | None = None
    highest: float | None = None
    hit_rate: float | None = None  # useful prefetches that had arrived among them
    moved_bytes_per_token: float | None = None
    stall_s_per_token: float | None = None  # host-driven: waited for; device-driven: longer than with all resident
    n_repeats: int = 0
    agrees: bool | None = None  # the last token's logits are those of the first arm beside it, bit for bit
    skipped: str | None = None


def decode_speeds(machine: Machine, setting: Setting, end_s: float = math.inf) -> Iterator[ArmSpeed]:
    """Every arm of one comparison: the bound, then device-driven ones interleaved, then host-driven ones. What needs a graph and cannot be
    captured is told as not measured, and does not take the others along.

    Args:
        end_s: time.monotonic() seconds after which no further repeat is begun.
    """
    scene = Scene.make(machine, setting)
    n_slots = scene.n_slots()
    bound = _resident(scene, end_s)
    yield bound
    gc.collect()  # all experts of the bound
    machine.limit(setting.memory_bytes)
    with ExitStack() as stack:
        source = stack.enter_context(closing(GeneratedSource(scene, machine.driver())))
        device_end_s = time.monotonic() + DEVICE_SHARE * (end_s - time.monotonic())
        for speed in _device_driven(
            scene, min(n_slots, MOST_DEVICE_SLOTS), source.mapped_address(ExpertKey(0, 0)), device_end_s
        ):
            yield _with_stall(speed, bound)
        gc.collect()  # the pool's memory, so that the next one finds room under the limit
        yield from _measured(scene, _host_arms(scene, n_slots, source, stack), end_s)


def rehearse_decode(setting: Setting) -> None:
    """Launch what `decode_speeds` launches, on tensors without memory."""
    scene = Scene.make(Machine(torch.device("meta")), setting)
    n_slots = scene.n_slots()
    arms: list[ResidentArm | DeviceArm] = [ResidentArm(scene), *_device_arms(scene, min(n_slots, MOST_DEVICE_SLOTS), 0)]
    for arm in arms:
        scene.model.rehearse(arm.experts)
    moe, geometry, device = setting.shape.moe, setting.geometry, scene.machine.device
    slots = torch.empty(n_slots, geometry.expert.row_bytes, dtype=torch.uint8, device=device)
    entries = torch.empty(moe.n_layers, moe.n_experts, dtype=torch.int64, device=device)
    ids, weights = torch.empty(1, moe.top_k, dtype=torch.int64, device=device), torch.empty(1, moe.top_k, device=device)
    table = expert_table(geometry.expert, (slots,), entries)  # by address, as the host's compute has it
    call = MoECall(scene.model.x, ids, weights, table, 0)
    computed_in_parts(call, [range(3)])


def _device_driven(scene: Scene, n_slots: int, mapped_rows: int, end_s: float) -> list[ArmSpeed]:
    try:
        return _measured(scene, _device_arms(scene, n_slots, mapped_rows), end_s)
    except Exception as failure:  # whatever a capture raises
        return [_not_measured(scene, "device", kind, n_slots, first_line(failure)) for kind in kinds(scene, n_slots)]


def _device_arms(scene: Scene, n_slots: int, mapped_rows: int) -> list[DeviceArm]:
    """In turn over the same slots."""
    row_bytes = scene.setting.geometry.expert.row_bytes
    slots = torch.empty(n_slots, row_bytes, dtype=torch.uint8, device=scene.machine.device)
    return [DeviceArm(scene, kind, slots, mapped_rows) for kind in kinds(scene, n_slots)]


def _host_arms(scene: Scene, n_slots: int, source: PinnedSource, stack: ExitStack) -> list[HostArm]:
    """One pool and its transfers, in turn; `stack` closes them."""
    machine = scene.machine
    fences = stack.enter_context(closing(SlotFences(source.driver, n_slots, machine.compute_stream)))
    pool = SlotPool(scene.setting.geometry, n_slots, machine.device, on_release=fences.raise_at)
    transfers = ThreadTransfers(
        source, pool.buffer, n_threads=N_THREADS, chunk_bytes=CHUNK_BYTES, slot_address=pool.address, fence=fences.event
    )
    stack.enter_context(closing(transfers))
    return [HostArm(scene, kind, pool, transfers) for kind in kinds(scene, n_slots)]


def _resident(scene: Scene, end_s: float) -> ArmSpeed:
    geometry = scene.setting.geometry
    if scene.machine.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info()
        if geometry.total_bytes > 0.95 * free_bytes:
            reason = f"all experts take {geometry.total_bytes / 1e9:.0f} GB, {free_bytes / 1e9:.0f} GB are free"
            return _not_measured(scene, "nobody", ResidentArm.kind, geometry.n_total, reason)
    try:
        return _measured(scene, [ResidentArm(scene)], end_s)[0]
    except Exception as failure:  # as above
        return _not_measured(scene, "nobody", ResidentArm.kind, geometry.n_total, first_line(failure))


def _not_measured(scene: Scene, driven_by: str, kind: Kind, n_slots: int, reason: str) -> ArmSpeed:
    return ArmSpeed(*_labels(scene), driven_by, kind.name, kind.policy, n_slots, skipped=reason)


def _measured(scene: Scene, arms: Sequence[Arm], end_s: float) -> list[ArmSpeed]:
    """Interleaved repeats, each from empty caches; at least one, and no further one is begun after `end_s`."""
    setting = scene.setting
    times: dict[str, list[float]] = {arm.kind.name: [] for arm in arms}
    tallies: dict[str, tuple[Tally, Tally]] = {}
    for repeat in range(setting.n_repeats):
        if repeat and time.monotonic() > end_s:
            break
        for arm in arms:
            seconds, before, after = _decoded(scene, arm)
            times[arm.kind.name].append(seconds)
            tallies[arm.kind.name] = before, after
    return [_speed(scene, arm, times[arm.kind.name], *tallies[arm.kind.name], _agree(arms[0], arm)) for arm in arms]


def _decoded(scene: Scene, arm: Arm) -> tuple[float, Tally, Tally]:
    """Seconds of all tokens behind the warm-up, and the arm's tallies before and after."""
    setting = scene.setting
    arm.restart()
    for index in range(setting.n_warmup):
        arm.token(index)
    before = arm.tally()
    began_s = time.perf_counter()
    for index in range(setting.n_warmup, setting.n_warmup + setting.n_tokens):
        arm.token(index)
    scene.machine.wait()
    seconds, after = time.perf_counter() - began_s, arm.tally()
    arm.finish()
    return seconds, before, after


def _agree(one: Arm, other: Arm) -> bool:
    return one.out is not None and other.out is not None and torch.equal(one.out, other.out)


def _speed(scene: Scene, arm: Arm, times: list[float], before: Tally, after: Tally, agrees: bool) -> ArmSpeed:
    n_tokens = scene.setting.n_tokens
    rates = spread([n_tokens / seconds for seconds in times])
    needed, hits, moved = (late - early for late, early in zip(after[:3], before[:3], strict=True))
    stall_s = None if after[3] is None or before[3] is None else (after[3] - before[3]) / n_tokens
    return ArmSpeed(
        *_labels(scene), arm.driven_by, arm.kind.name, arm.kind.policy, arm.n_slots,
        rates.median, rates.low, rates.high, hits / needed, moved / n_tokens, stall_s, len(times), agrees,
    )  # fmt: skip


def _with_stall(speed: ArmSpeed, bound: ArmSpeed) -> ArmSpeed:
    if speed.tokens_per_s is None or bound.tokens_per_s is None:
        return speed
    return replace(speed, stall_s_per_token=1 / speed.tokens_per_s - 1 / bound.tokens_per_s)


def _labels(scene: Scene) -> tuple[str, str]:
    return scene.setting.shape.moe.name, scene.setting.experts
