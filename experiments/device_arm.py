"""An arm driven by the device: the cache's books and its copies are the work of kernels, and no layer waits for the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.slot_budget import SlotBudget, is_kind, slot_budget
from kernels.device_cache import DeviceCache, slru_protected
from kernels.quantised_experts import expert_table
from kernels.slot_table import ExpertTable
from prefetch.cache.slru import Slru
from prefetch.device import compute_device, settle
from prefetch.device_recording import RecordedDeviceRuntime
from prefetch.geometry import ExpertKey, MoEGeometry
from prefetch.planner.none import NoPrefetch
from prefetch.slots import SlotPool
from prefetch.store import ExpertStore
from prefetch.transfers.pinned import PinnedSource


@contextmanager
def device_driven(cfg: DictConfig, store: ExpertStore, source: PinnedSource) -> Iterator[RecordedDeviceRuntime]:
    """The arm's runtime, closed at the end of the block; `experiments.config.validate` has passed `cfg`."""
    geometry, device = store.geometry, compute_device(cfg.backend.kind)
    budget = slot_budget(cfg, geometry)
    with ExitStack() as stack:
        stack.callback(settle, device)  # kernels may still read slots, and pinned memory that its owner unpins next
        slots = SlotPool(geometry, budget.n_slots, device).rows
        yield RecordedDeviceRuntime(
            geometry,
            slots,
            backing_table(geometry, source, device),
            _cache(cfg.cache, budget, geometry, device),
            instantiate(cfg.predictor),
            n_guesses=_n_guesses(cfg.planner, geometry),
        )


def backing_table(geometry: MoEGeometry, source: PinnedSource, device: torch.device) -> ExpertTable:
    """Where the kernels of `device` find every expert across the link."""
    first = ExpertKey(0, 0)
    rows = torch.from_numpy(source.rows_from(first, geometry.n_total))
    addresses = source.mapped_address(first) + torch.arange(geometry.n_total) * geometry.expert.row_bytes
    return expert_table(geometry.expert, (rows,), addresses.view(geometry.n_layers, geometry.n_experts).to(device))


def _cache(cache: DictConfig, budget: SlotBudget, geometry: MoEGeometry, device: torch.device) -> DeviceCache:
    protected = slru_protected(budget.capacity) if is_kind(cache, Slru) else 0
    return DeviceCache.empty(
        geometry.n_layers,
        geometry.n_experts,
        capacity=budget.capacity,
        staging=budget.staging,
        transient=budget.transient,
        protected_capacity=protected,
        device=device,
    )


def _n_guesses(planner: DictConfig, geometry: MoEGeometry) -> int | None:
    if is_kind(planner, NoPrefetch):
        return None
    return min((planner.m or geometry.top_k) + planner.extra, geometry.n_experts)
