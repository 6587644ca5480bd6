"""How many slots each arm of a comparison has, and what it uses them for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import DictConfig

from kernels.device_cache import MAX_SLOTS
from predictors.none import NoPredictor
from prefetch.cache.none import NoCache
from prefetch.cache.resident import Resident
from prefetch.errors import CapacityError
from prefetch.geometry import MoEGeometry
from prefetch.slots import parse_slots


@dataclass(frozen=True)
class SlotBudget:
    """How an arm divides its slots. Every arm of a comparison has the same number, whatever it uses them for."""

    n_slots: int
    capacity: int  # cache members
    staging: int  # prefetches not yet confirmed
    transient: int  # experts the policy declines


def slot_budget(cfg: DictConfig, geometry: MoEGeometry) -> SlotBudget:
    """Divide `cfg.cache.slots`. An arm without predictor leaves its staging slots to the cache: equal memory for all.

    Raises:
        CapacityError: too few slots for one token's experts, or for the cache beside staging; or more than a device's planner knows.
    """
    if is_kind(cfg.cache, Resident):
        return SlotBudget(geometry.n_total, geometry.n_total, 0, 0)
    n_slots = parse_slots(cfg.cache.slots, geometry, "cache.slots")
    if n_slots < geometry.top_k:
        raise CapacityError(
            f"cache.slots={cfg.cache.slots} gives {n_slots} slots, but one token needs {geometry.top_k} experts per layer: "
            f"give at least {geometry.top_k}"
        )
    prefetches = not is_kind(cfg.predictor, NoPredictor) and cfg.cache.prefetch_admission == "staging"
    staging = cfg.cache.staging if prefetches else 0
    transient = n_slots - staging if is_kind(cfg.cache, NoCache) else cfg.cache.transient
    if "backend" in cfg and cfg.backend.driven_by == "device":
        transient = max(transient, cfg.workload.batch_size * geometry.top_k)  # its plan needs a slot for each pair of a step
        if n_slots > MAX_SLOTS:
            raise CapacityError(
                f"cache.slots={cfg.cache.slots} gives {n_slots} slots; backend.driven_by=device keeps its books in registers, of {MAX_SLOTS} "
                "slots at most"
            )
    capacity = n_slots - staging - transient
    if capacity < (0 if is_kind(cfg.cache, NoCache) else 1):
        raise CapacityError(
            f"cache.slots={cfg.cache.slots} gives {n_slots} slots; {staging} for staging and {transient} for transients leave "
            "none for the cache: raise cache.slots or lower cache.staging"
        )
    return SlotBudget(n_slots, capacity, staging, transient)


def check_slots(arms: Mapping[str, DictConfig], geometry: MoEGeometry, n_bytes: int | None) -> None:
    """Every arm's slots, by arm name, are as many as it needs, and fit into `n_bytes` of memory where that is known.

    Raises:
        CapacityError: they are too few, or too many; naming the arm and what would be right.
    """
    for name, cfg in arms.items():
        wanted_bytes = slot_budget(cfg, geometry).n_slots * geometry.expert.row_bytes
        if n_bytes is not None and wanted_bytes > n_bytes:
            raise CapacityError(
                f"arm {name}: its slots take {wanted_bytes / 1e9:.2f} GB of the GPU's memory, where {max(n_bytes, 0) / 1e9:.2f} GB are "
                f"left for them: lower cache.slots, raise backend.memory, or leave the arm out (arms.{name}=null)"
            )


def is_kind(cfg: DictConfig, kind: type) -> bool:
    """`cfg` is of exactly this plug-in."""
    return cfg._target_ == f"{kind.__module__}.{kind.__name__}"
