"""What an arm is made of besides its machinery: the same parts, from the same configuration, where it decodes and where it is replayed."""

from __future__ import annotations

from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.config import compose_policy
from experiments.slot_budget import SlotBudget, is_kind
from predictors.base import Predictor
from predictors.none import NoPredictor
from prefetch.accounting import violations
from prefetch.errors import GatecastError
from prefetch.fast_tier import FastTier
from prefetch.geometry import MoEGeometry
from prefetch.planner.base import Planner
from prefetch.planner.none import NoPrefetch
from prefetch.recorder import RunRecord
from prefetch.slot_books import SlotBooks
from prefetch.trace import RoutingTrace
from prefetch.transfers.base import Transfers


def build_tier(cfg: DictConfig, budget: SlotBudget, geometry: MoEGeometry, pool: SlotBooks, transfers: Transfers) -> FastTier:
    """The arm's cache, per layer or over all layers, with its slots and transfers."""
    return FastTier(
        pool,
        compose_policy(cfg.cache, budget.capacity, geometry.n_layers),
        transfers,
        staging=budget.staging,
        transient=budget.transient,
        policy_admits=cfg.cache.prefetch_admission == "policy",
    )


def build_predictor(cfg: DictConfig, trace: RoutingTrace | None) -> Predictor:
    """The arm's predictor, not bound yet; `trace` is what an oracle reads."""
    predictor: Predictor = instantiate(cfg.predictor)
    if trace is not None and hasattr(predictor, "use_trace"):
        predictor.use_trace(trace)
    return predictor


def build_planner(cfg: DictConfig) -> Planner:
    """The arm's planner; one that would have nothing to plan is not asked."""
    plans = not is_kind(cfg.predictor, NoPredictor) or leaves_in_place(cfg)
    planner: Planner = instantiate(cfg.planner) if plans else NoPrefetch()
    return planner


def leaves_in_place(cfg: DictConfig) -> bool:
    """The planner may leave misses in the backing tier, to be computed there."""
    return "cpu_fallback" in cfg.planner._target_


def check_books(name: str, record: RunRecord) -> None:
    """Raise GatecastError where the run of arm `name` breaks an accounting identity."""
    broken = violations(record)
    if broken:
        raise GatecastError(f"arm {name}: the run's books do not balance: {'; '.join(broken)}")
