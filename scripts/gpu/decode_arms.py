"""The arms of an offloaded decode: driven by the device, driven by the host, and with every expert resident."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernels.device_cache import DeviceCache, slru_protected
from kernels.moe_call import MoECall
from kernels.moe_mlp import moe_mlp
from kernels.quantised_experts import expert_table
from predictors.base import LayerView, Prediction, Predictor
from predictors.none import NoPredictor
from prefetch.cache.base import CachePolicy
from prefetch.cache.lru import Lru
from prefetch.cache.replay import replay_hits
from prefetch.cache.slru import Slru
from prefetch.compute.kernel_experts import KernelExperts
from prefetch.device_runtime import DeviceRuntime
from prefetch.fast_tier import FastTier
from prefetch.geometry import ExpertKey
from prefetch.planner.top_m import TopM
from prefetch.runtime import OffloadRuntime
from prefetch.slots import SlotPool
from prefetch.transfers.cuda_driver import CudaDriver
from prefetch.transfers.pinned import PinnedSource
from prefetch.transfers.threads import ThreadTransfers
from scripts.gpu.decode_scene import RECALL, Scene
from scripts.gpu.generated_routing import Ids

N_THREADS = 2
Tally = tuple[int, int, int, float | None]
STAGING_LAYERS = 2  # staging slots for the guesses of so many layers


@dataclass(frozen=True)
class Kind:
    """What an arm is compared for: a cache policy, and whether it prefetches."""

    name: str
    policy: str  # of POLICIES

    @property
    def prefetches(self) -> bool:
        return self.name in RECALL


@dataclass(frozen=True)
class Policy:
    """A rule, as the host's object and as the device's numbers."""

    on_host: Callable[[int], CachePolicy]  # given its capacity
    protected: Callable[[int], int]


POLICIES = {"slru": Policy(partial(Slru, fill=True), slru_protected), "lru": Policy(Lru, lambda capacity: 0)}


def kinds(scene: Scene, n_slots: int) -> list[Kind]:
    """Caching alone by both policies, then prefetches over the one that hits more often on this routing."""
    best = max(POLICIES, key=lambda name: replayed_hit_rate(scene, name, n_slots))
    return [*(Kind(name, name) for name in POLICIES), *(Kind(name, best) for name in RECALL)]


def replayed_hit_rate(scene: Scene, policy: str, n_slots: int) -> float:
    """Of all tokens, without prefetches."""
    n_tokens, n_layers, top_k = scene.routing.shape
    events = [
        [ExpertKey(layer, expert) for expert in scene.routing[token, layer].tolist()]
        for token in range(n_tokens)
        for layer in range(n_layers)
    ]
    return replay_hits(POLICIES[policy].on_host(n_slots - top_k), events).hit_rate


class Arm(ABC):
    """Decodes the same tokens as every other arm."""

    kind: Kind
    driven_by: str
    n_slots: int
    out: Tensor | None = None  # logits of the last token, [1, V]

    @abstractmethod
    def restart(self) -> None:
        """Empty caches, counters at zero."""

    @abstractmethod
    def token(self, index: int) -> None:
        """Decode token `index` of the routing; need not wait for it."""

    @abstractmethod
    def tally(self) -> Tally:
        """Experts needed, hits, bytes moved, and seconds stalled where known, since `restart`; waits for the device."""

    def finish(self) -> None:
        """Leave what arms share to the next one."""


class GeneratedSource(PinnedSource):
    """`Scene.rows`, pinned."""

    def __init__(self, scene: Scene, driver: CudaDriver):
        self.scene = scene
        row_bytes = scene.setting.geometry.expert.row_bytes
        row_of = scene.row_of.tolist()
        super().__init__(
            "generated experts", lambda key: row_of[key.layer][key.expert] * row_bytes, row_bytes, driver, N_THREADS
        )

    def load(self) -> np.ndarray:
        return self.scene.rows.view(-1).numpy()


class DeviceArm(Arm):
    """The device-driven runtime: one graph a token.

    Args:
        slots: uint8 [n_slots, row_bytes], on the device.
        mapped_rows: where its kernels find `scene.rows`.
    """

    driven_by = "device"

    def __init__(self, scene: Scene, kind: Kind, slots: Tensor, mapped_rows: int):
        self.scene, self.kind, self.n_slots = scene, kind, len(slots)
        geometry = scene.setting.geometry
        staging = STAGING_LAYERS * geometry.top_k if kind.prefetches else 0
        capacity = self.n_slots - staging - geometry.top_k
        self.cache = DeviceCache.empty(
            geometry.n_layers,
            geometry.n_experts,
            capacity=capacity,
            staging=staging,
            transient=geometry.top_k,
            protected_capacity=POLICIES[kind.policy].protected(capacity),
            device=slots.device,
        )
        addresses = mapped_rows + scene.row_of * geometry.expert.row_bytes
        backing = expert_table(geometry.expert, (scene.rows,), addresses.to(slots.device))
        self.runtime = DeviceRuntime(geometry, slots, backing, self.cache, NoPredictor())
        self.routing = torch.from_numpy(scene.routing).to(slots.device)
        self.ids = self.routing[0].clone()
        n_guesses = scene.setting.device_guesses  # the first are those that are right
        self.guessed = (
            torch.from_numpy(scene.guesses[kind.name][:, :, :n_guesses]).to(slots.device) if kind.prefetches else None
        )
        self.guesses = self.guessed[0].clone() if self.guessed is not None else None
        self.replay = scene.machine.captured(self._step)

    def experts(self, layer: int, hidden: Tensor, weights: Tensor) -> Tensor:
        """One layer's routed experts."""
        following = layer + 1
        guesses = self.guesses[following][None] if self.guesses is not None and following < len(self.ids) else None
        return self.runtime.planned_call(layer, hidden, self.ids[layer][None], weights, guesses)

    def _step(self) -> None:
        self.out = self.scene.model.step(self.experts)
        self.runtime.end_forward()

    def restart(self) -> None:
        self.cache.clear()
        self.scene.model.restart()

    def token(self, index: int) -> None:
        self.ids.copy_(self.routing[index])
        if self.guesses is not None and self.guessed is not None:
            self.guesses.copy_(self.guessed[index])
        self.replay()

    def tally(self) -> Tally:
        counts = self.runtime.counts()
        hits = counts["hits"] + counts["useful"]
        moved = (counts["misses"] + counts["prefetches"]) * self.scene.setting.geometry.expert.row_bytes
        return hits + counts["misses"], hits, moved, None


class ReplayedGuesses(Predictor):
    """Guesses for the next layer that were made beforehand."""

    name = "replayed"
    on_device = True  # it reads no state: none has to come to the host for it

    def __init__(self, guesses: Ids, n_experts: int):
        self.guesses, self.n_experts, self.token = torch.from_numpy(guesses), n_experts, 0

    def predict(self, seen: LayerView) -> list[Prediction]:
        target = seen.layer + 1
        if target >= self.guesses.shape[1]:
            return []
        ids = self.guesses[self.token, target]
        scores = torch.full((1, self.n_experts), -torch.inf)
        scores[0, ids] = torch.arange(len(ids), 0, -1, dtype=torch.float32)
        return [Prediction(target, scores)]


class HostArm(Arm):
    """The host-driven runtime: the copy engine, a round trip a layer."""

    driven_by = "host"

    def __init__(self, scene: Scene, kind: Kind, pool: SlotPool, transfers: ThreadTransfers):
        self.scene, self.kind, self.n_slots = scene, kind, pool.n_slots
        self.pool, self.transfers = pool, transfers
        self.routing = torch.from_numpy(scene.routing).to(scene.machine.device)
        self.runtime: OffloadRuntime | None = None

    def restart(self) -> None:
        self.finish()
        geometry = self.scene.setting.geometry
        predictor: Predictor = NoPredictor()
        if self.kind.prefetches:
            predictor = ReplayedGuesses(self.scene.guesses[self.kind.name], geometry.n_experts)
        staging = STAGING_LAYERS * geometry.top_k if self.kind.prefetches else 0
        policy = POLICIES[self.kind.policy].on_host(self.n_slots - staging - geometry.top_k)
        tier = FastTier(self.pool, policy, self.transfers, staging=staging, transient=geometry.top_k)
        compute = KernelExperts(geometry, self.pool)
        self.runtime = OffloadRuntime(geometry, tier, predictor, TopM(), _no_reading, compute)
        self.scene.model.restart()

    def finish(self) -> None:
        if self.runtime is None:
            return
        self.runtime.finish()
        for key in list(self.runtime.tier.slots):
            self.runtime.tier.release(key)
        self.runtime = None

    def token(self, index: int) -> None:
        runtime = self.runtime
        assert runtime is not None, "restart comes first"
        if isinstance(runtime.predictor, ReplayedGuesses):
            runtime.predictor.token = index
        runtime.begin_forward(torch.zeros(1, dtype=torch.int64), new_sequence=index == 0)
        self.out = self.scene.model.step(
            lambda layer, hidden, weights: runtime.layer_call(layer, hidden, self.routing[index, layer][None], weights)
        )
        runtime.end_forward()

    def tally(self) -> Tally:
        assert self.runtime is not None, "restart comes first"
        self.scene.machine.wait()
        record = self.runtime.record()
        calls = record.calls
        return (
            int(calls["needed"].sum()),
            int(calls["hits"].sum()),
            int(record.transfers["moved_bytes"].sum()),
            float(calls["stall_s"].sum()),
        )


class ResidentArm(Arm):
    """Every expert in device memory: the bound."""

    kind, driven_by = Kind("resident", "none"), "nobody"

    def __init__(self, scene: Scene):
        self.scene = scene
        geometry, device = scene.setting.geometry, scene.machine.device
        self.n_slots = geometry.n_total
        pool = torch.empty(geometry.n_total, geometry.expert.row_bytes, dtype=torch.uint8, device=device)
        once = pool[: len(scene.rows)]
        once.copy_(scene.rows[: len(once)])
        for first in range(len(once), geometry.n_total, len(once)):  # the others within the device: its memory is faster
            part = pool[first : first + len(once)]
            part.copy_(once[: len(part)])
        slot_of = torch.arange(geometry.n_total, dtype=torch.int32, device=device).view(geometry.n_layers, geometry.n_experts)
        self.table = expert_table(geometry.expert, (pool,), slot_of)
        # A flag of each call's own would cost a launch a layer, which no other arm pays.
        self.missed = torch.zeros(1, dtype=torch.int32, device=device)
        self.routing = torch.from_numpy(scene.routing).to(device)
        self.ids, self.n_decoded = self.routing[0].clone(), 0
        self.replay = scene.machine.captured(self._step)

    def experts(self, layer: int, hidden: Tensor, weights: Tensor) -> Tensor:
        """One layer's routed experts."""
        return moe_mlp(MoECall(hidden, self.ids[layer][None], weights, self.table, layer), missed=self.missed)

    def _step(self) -> None:
        self.out = self.scene.model.step(self.experts)

    def restart(self) -> None:
        self.n_decoded = 0
        self.scene.model.restart()

    def token(self, index: int) -> None:
        self.ids.copy_(self.routing[index])
        self.n_decoded += 1
        self.replay()

    def tally(self) -> Tally:
        self.scene.machine.wait()
        needed = self.n_decoded * self.ids.numel()
        return needed, needed, 0, 0.0


def _no_reading(key: ExpertKey) -> tuple[Tensor, Tensor]:
    raise AssertionError("no planner here leaves experts in place")
