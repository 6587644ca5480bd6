"""One arm of a comparison: a cache, a predictor and a planner over the same store, and one run of it."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from experiments.arm_parts import build_planner, build_predictor, build_tier
from experiments.backend import backend, build_source
from experiments.config import repository_path
from experiments.device_arm import device_driven
from experiments.generation import Generation, generate_all
from experiments.slot_budget import is_kind, slot_budget
from experiments.workload import Batch
from predictors import hot_experts
from predictors.base import ModelView
from predictors.none import NoPredictor
from prefetch.device_recording import RecordedDeviceRuntime
from prefetch.geometry import ExpertKey
from prefetch.model import attach
from prefetch.recorder import RunRecord
from prefetch.runtime import OffloadRuntime
from prefetch.store import ExpertStore
from prefetch.trace import RoutingTrace
from prefetch.transfers.pinned import PinnedSource
from prefetch.transfers.sources import Source


@dataclass
class ArmRun:
    """One run of one arm over the whole workload."""

    record: RunRecord
    trace: RoutingTrace
    generations: list[Generation]
    predictor_failed: bool
    peak_rss_bytes: int


def preload_order(cache: DictConfig, model: ModelView) -> list[ExpertKey]:
    """The experts that `cache` begins with, hottest first; more than fit, of which the policy keeps the first.

    Raises:
        PredictorError: the table of hot experts is missing, damaged, or of another model.
    """
    if cache.preload == "none":
        return []
    return hot_experts.hottest_first(hot_experts.load(repository_path(cache.hot_experts), model))


@contextmanager
def server(
    cfg: DictConfig, store: ExpertStore, trace: RoutingTrace | None, source: Source | None = None
) -> Iterator[OffloadRuntime | RecordedDeviceRuntime]:
    """The arm's runtime, driven by whom `cfg` says, closed at the end of the block; arguments as for `runtime`."""
    with ExitStack() as stack:
        if cfg.backend.driven_by == "host":
            yield stack.enter_context(runtime(cfg, store, trace, source))
            return
        if source is None:
            source = stack.enter_context(closing(build_source(cfg, store)))
        assert isinstance(source, PinnedSource), "the only tier of a GPU"
        yield stack.enter_context(device_driven(cfg, store, source))


@contextmanager
def runtime(
    cfg: DictConfig, store: ExpertStore, trace: RoutingTrace | None, source: Source | None = None
) -> Iterator[OffloadRuntime]:
    """The arm's host-driven runtime, closed at the end of the block.

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
        tier = build_tier(cfg, budget, geometry, parts.pool, parts.transfers)
        predictor, planner = build_predictor(cfg, trace), build_planner(cfg)
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
    with server(cfg, store, trace, source) as served:
        with attach(model, served, fuse_routers=cfg.backend.router == "fused"):
            if isinstance(served, OffloadRuntime):
                served.tier.preload(preload_order(cfg.cache, served.model))
            generations = list(generate_all(model, batches, cfg.workload, cfg.seed))
        served.finish()
        failed = isinstance(served.predictor, NoPredictor) and not is_kind(cfg.predictor, NoPredictor)
        record = served.record()
        peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return ArmRun(record, served.recorder.trace(metadata), generations, failed, peak_rss_bytes)


def rounding_unit(dtype: torch.dtype) -> float:
    """Relative spacing of the dtype's numbers."""
    return torch.finfo(dtype).eps
