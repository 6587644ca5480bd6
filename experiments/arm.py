"""One arm of a comparison: a cache, a predictor and a planner over the same store, and one run of it."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from experiments.backend import backend, build_source
from experiments.config import compose_policy, repository_path
from experiments.generation import Generation, generate_all
from experiments.workload import Batch
from predictors import hot_experts
from predictors.base import ModelView
from predictors.none import NoPredictor
from prefetch.cache.base import CachePolicy
from prefetch.cache.none import NoCache
from prefetch.cache.resident import Resident
from prefetch.errors import CapacityError
from prefetch.fast_tier import FastTier
from prefetch.geometry import ExpertKey, MoEGeometry
from prefetch.model import attach
from prefetch.planner.none import NoPrefetch
from prefetch.recorder import RunRecord
from prefetch.runtime import OffloadRuntime
from prefetch.slots import parse_slots
from prefetch.store import ExpertStore
from prefetch.trace import RoutingTrace
from prefetch.transfers.sources import Source


@dataclass(frozen=True)
class SlotBudget:
    """How an arm divides its slots. Every arm of a comparison has the same number, whatever it uses them for."""

    n_slots: int
    capacity: int  # cache members
    staging: int  # prefetches not yet confirmed
    transient: int  # experts the policy declines


@dataclass
class ArmRun:
    """One run of one arm over the whole workload."""

    record: RunRecord
    trace: RoutingTrace
    generations: list[Generation]
    predictor_failed: bool
    peak_rss_bytes: int


def slot_budget(cfg: DictConfig, geometry: MoEGeometry) -> SlotBudget:
    """Divide `cfg.cache.slots`. An arm without predictor leaves its staging slots to the cache: equal memory for all.

    Raises:
        CapacityError: too few slots for one token's experts, or for the cache beside staging.
    """
    policy_class = cfg.cache._target_
    if policy_class == f"{Resident.__module__}.{Resident.__name__}":
        return SlotBudget(geometry.n_total, geometry.n_total, 0, 0)
    n_slots = parse_slots(cfg.cache.slots, geometry)
    if n_slots < geometry.top_k:
        raise CapacityError(
            f"cache.slots={cfg.cache.slots} gives {n_slots} slots, but one token needs {geometry.top_k} experts per layer: "
            f"give at least {geometry.top_k}"
        )
    prefetches = not _is(cfg.predictor, NoPredictor) and cfg.cache.prefetch_admission == "staging"
    staging = cfg.cache.staging if prefetches else 0
    transient = n_slots - staging if _is(cfg.cache, NoCache) else cfg.cache.transient
    capacity = n_slots - staging - transient
    if capacity < (0 if _is(cfg.cache, NoCache) else 1):
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


def build_policy(cfg: DictConfig, budget: SlotBudget, geometry: MoEGeometry) -> CachePolicy:
    """The arm's cache policy, per layer or over all layers."""
    return compose_policy(cfg.cache, budget.capacity, geometry.n_layers)


def preload_order(cache: DictConfig, model: ModelView) -> list[ExpertKey]:
    """The experts that `cache` begins with, hottest first; more than fit, of which the policy keeps the first.

    Raises:
        PredictorError: the table of hot experts is missing, damaged, or of another model.
    """
    if cache.preload == "none":
        return []
    return hot_experts.hottest_first(hot_experts.load(repository_path(cache.hot_experts), model))


@contextmanager
def runtime(
    cfg: DictConfig, store: ExpertStore, trace: RoutingTrace | None, source: Source | None = None
) -> Iterator[OffloadRuntime]:
    """The arm's runtime, closed at the end of the block.

    Args:
        trace: what an oracle reads.
        source: the arm's backing tier where it is open already; by default it is opened, and closed in the end.
    """
    geometry = store.geometry
    budget = slot_budget(cfg, geometry)
    with ExitStack() as stack:
        if source is None:
            source = stack.enter_context(closing(build_source(cfg, store)))
        parts = stack.enter_context(backend(cfg, store, budget.n_slots, source))
        tier = FastTier(
            parts.pool,
            build_policy(cfg, budget, geometry),
            parts.transfers,
            staging=budget.staging,
            transient=budget.transient,
            policy_admits=cfg.cache.prefetch_admission == "policy",
        )
        predictor = instantiate(cfg.predictor)
        if trace is not None and hasattr(predictor, "use_trace"):
            predictor.use_trace(trace)
        plans = not _is(cfg.predictor, NoPredictor) or leaves_in_place(cfg)
        planner = instantiate(cfg.planner) if plans else NoPrefetch()
        yield OffloadRuntime(geometry, tier, predictor, planner, partial(_read_expert, store, source), parts.compute)


def _read_expert(store: ExpertStore, source: Source, key: ExpertKey) -> tuple[Tensor, Tensor]:
    """An expert's weights where the backing tier has them, for the CPU to compute with."""
    return store.views(torch.frombuffer(source.row(key), dtype=torch.uint8))


def run_arm(
    cfg: DictConfig,
    model: PreTrainedModel,
    store: ExpertStore,
    batches: list[Batch],
    trace: RoutingTrace | None,
    metadata: dict[str, str],
    source: Source | None = None,
) -> ArmRun:
    """Decode the whole workload once with this arm, from an empty cache or one that begins with hot experts; `source` as for `runtime`."""
    gc.collect()  # so that no arm pays for the garbage of another
    with runtime(cfg, store, trace, source) as served:
        with attach(model, served):
            served.tier.preload(preload_order(cfg.cache, served.model))
            generations = list(generate_all(model, batches, cfg.workload, cfg.seed))
        served.finish()
        failed = isinstance(served.predictor, NoPredictor) and not _is(cfg.predictor, NoPredictor)
        record = served.recorder.record(served.tier.records)
        peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return ArmRun(record, served.recorder.trace(metadata), generations, failed, peak_rss_bytes)


def rounding_unit(dtype: torch.dtype) -> float:
    """Relative spacing of the dtype's numbers."""
    return torch.finfo(dtype).eps


def _is(cfg: DictConfig, kind: type) -> bool:
    return cfg._target_ == f"{kind.__module__}.{kind.__name__}"


def leaves_in_place(cfg: DictConfig) -> bool:
    """The planner may leave misses in the backing tier, to be computed there."""
    return "cpu_fallback" in cfg.planner._target_
