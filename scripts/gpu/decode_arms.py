"""The arms of an offloaded decode: driven by the device, driven by the host, and with every expert resident."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from kernels.device_cache import DeviceCache, slru_protected
from kernels.moe_call import MoECall
from kernels.moe_mlp import moe_mlp
from kernels.quantised_experts import expert_table
from predictors.base import LayerView, Prediction, Predictor
from predictors.none import NoPredictor
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
STAGING_LAYERS = 2  # staging slots for the guesses of so many layers


class Arm(ABC):
    """Decodes the same tokens as every other arm."""

    name: str
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
    def tally(self) -> tuple[int, int, int, float | None]:
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
    """The device-driven runtime: one graph a token."""

    driven_by = "device"

    def __init__(self, scene: Scene, name: str, slots: Tensor, source: PinnedSource):
        self.scene, self.name, self.n_slots = scene, name, len(slots)
        geometry = scene.setting.geometry
        staging = STAGING_LAYERS * geometry.top_k if name in RECALL else 0
        capacity = self.n_slots - staging - geometry.top_k
        self.cache = DeviceCache.empty(
            geometry.n_layers,
            geometry.n_experts,
            capacity=capacity,
            staging=staging,
            transient=geometry.top_k,
            protected_capacity=slru_protected(capacity),
            device=slots.device,
        )
        addresses = source.mapped_address(ExpertKey(0, 0)) + scene.row_of * geometry.expert.row_bytes
        backing = expert_table(geometry.expert, (scene.rows,), addresses.to(slots.device))
        self.runtime = DeviceRuntime(geometry, slots, backing, self.cache, NoPredictor())
        self.routing = torch.from_numpy(scene.routing).to(slots.device)
        self.ids = self.routing[0].clone()
        self.guessed = torch.from_numpy(scene.guesses[name]).to(slots.device) if name in RECALL else None
        self.guesses = self.guessed[0].clone() if self.guessed is not None else None
        self.replay = scene.machine.captured(self._step)

    def _step(self) -> None:
        def experts(layer: int, hidden: Tensor, weights: Tensor) -> Tensor:
            following = layer + 1
            guesses = self.guesses[following][None] if self.guesses is not None and following < len(self.ids) else None
            return self.runtime.planned_call(layer, hidden, self.ids[layer][None], weights, guesses)

        self.out = self.scene.model.step(experts)
        self.runtime.end_forward()

    def restart(self) -> None:
        self.cache.clear()
        self.scene.model.restart()

    def token(self, index: int) -> None:
        self.ids.copy_(self.routing[index])
        if self.guesses is not None and self.guessed is not None:
            self.guesses.copy_(self.guessed[index])
        self.replay()

    def tally(self) -> tuple[int, int, int, float | None]:
        counts = self.runtime.counts()
        hits = counts["hits"] + counts["useful"]
        moved = (counts["misses"] + counts["prefetches"]) * self.scene.setting.geometry.expert.row_bytes
        return hits + counts["misses"], hits, moved, None


class ReplayedGuesses(Predictor):
    """Guesses for the next layer that were made beforehand."""

    name = "replayed"

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

    def __init__(self, scene: Scene, name: str, pool: SlotPool, transfers: ThreadTransfers):
        self.scene, self.name, self.n_slots = scene, name, pool.n_slots
        self.pool, self.transfers = pool, transfers
        self.routing = torch.from_numpy(scene.routing).to(scene.machine.device)
        self.runtime: OffloadRuntime | None = None

    def restart(self) -> None:
        self.finish()
        geometry = self.scene.setting.geometry
        predictor: Predictor = NoPredictor()
        if self.name in RECALL:
            predictor = ReplayedGuesses(self.scene.guesses[self.name], geometry.n_experts)
        staging = STAGING_LAYERS * geometry.top_k if self.name in RECALL else 0
        policy = Slru(self.n_slots - staging - geometry.top_k, fill=True)  # the device's rule
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

    def tally(self) -> tuple[int, int, int, float | None]:
        assert self.runtime is not None, "restart comes first"
        self.scene.machine.wait()
        record = self.runtime.recorder.record(self.runtime.tier.records)
        calls = record.calls
        return (
            int(calls["needed"].sum()),
            int(calls["hits"].sum()),
            int(record.transfers["moved_bytes"].sum()),
            float(calls["stall_s"].sum()),
        )


class ResidentArm(Arm):
    """Every expert in device memory: the bound."""

    name, driven_by = "resident", "nobody"

    def __init__(self, scene: Scene):
        self.scene = scene
        geometry, device = scene.setting.geometry, scene.machine.device
        self.n_slots = geometry.n_total
        pool = torch.empty(geometry.n_total, geometry.expert.row_bytes, dtype=torch.uint8, device=device)
        for first in range(0, geometry.n_total, len(scene.rows)):
            part = pool[first : first + len(scene.rows)]
            part.copy_(scene.rows[: len(part)])
        slot_of = torch.arange(geometry.n_total, dtype=torch.int32, device=device).view(geometry.n_layers, geometry.n_experts)
        self.table = expert_table(geometry.expert, (pool,), slot_of)
        self.routing = torch.from_numpy(scene.routing).to(device)
        self.ids, self.n_decoded = self.routing[0].clone(), 0
        self.replay = scene.machine.captured(self._step)

    def _step(self) -> None:
        self.out = self.scene.model.step(
            lambda layer, hidden, weights: moe_mlp(MoECall(hidden, self.ids[layer][None], weights, self.table, layer))
        )

    def restart(self) -> None:
        self.n_decoded = 0
        self.scene.model.restart()

    def token(self, index: int) -> None:
        self.ids.copy_(self.routing[index])
        self.n_decoded += 1
        self.replay()

    def tally(self) -> tuple[int, int, int, float | None]:
        self.scene.machine.wait()
        needed = self.n_decoded * self.ids.numel()
        return needed, needed, 0, 0.0


def _no_reading(key: ExpertKey) -> tuple[Tensor, Tensor]:
    raise AssertionError("no planner here leaves experts in place")
