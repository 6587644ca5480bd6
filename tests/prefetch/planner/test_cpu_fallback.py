"""Which misses the CPU computes, and that prefetches stay the inner planner's."""

from __future__ import annotations

import pytest
import torch

from predictors.base import Prediction
from prefetch.errors import ConfigError
from prefetch.geometry import ExpertGeometry, ExpertKey, MoEGeometry
from prefetch.planner.base import FastTierView
from prefetch.planner.cpu_fallback import CpuFallback
from prefetch.planner.none import NoPrefetch
from prefetch.planner.top_m import TopM

GEOMETRY = MoEGeometry(4, 6, 2, ExpertGeometry(32, 16, torch.float32))
ROW_BYTES = GEOMETRY.expert.row_bytes
MISSING = [ExpertKey(1, e) for e in (5, 0, 3)]


def tier(queued_bytes: int) -> FastTierView:
    return FastTierView(lambda key: False, 4, queued_bytes)


def bound(link_experts: int) -> CpuFallback:
    planner = CpuFallback(TopM(), link_experts)
    planner.bind(GEOMETRY)
    return planner


@pytest.mark.parametrize("queued_experts", [0, 1, 10])
def test_without_a_link_share_the_cpu_computes_every_miss(queued_experts: int) -> None:
    assert bound(0).leave_in_place(MISSING, tier(queued_experts * ROW_BYTES)) == MISSING


@pytest.mark.parametrize(("queued_bytes", "by_link"), [(0, 2), (1, 1), (ROW_BYTES, 1), (ROW_BYTES + 1, 0), (9 * ROW_BYTES, 0)])
def test_the_link_takes_misses_until_its_queue_is_full(queued_bytes: int, by_link: int) -> None:
    assert bound(2).leave_in_place(MISSING, tier(queued_bytes)) == MISSING[by_link:]


def test_prefetches_are_the_inner_planners() -> None:
    inner = TopM()
    inner.bind(GEOMETRY)
    predicted = [Prediction(2, torch.rand(3, 6, generator=torch.Generator().manual_seed(0)))]
    planned = bound(1).plan(predicted, tier(0))
    assert planned == inner.plan(predicted, tier(0))
    assert planned


def test_other_planners_leave_all_misses_to_the_link() -> None:
    for planner in (TopM(), NoPrefetch()):
        planner.bind(GEOMETRY)
        assert planner.leave_in_place(MISSING, tier(99 * ROW_BYTES)) == []


def test_refuses_a_negative_queue() -> None:
    with pytest.raises(ConfigError, match=r"planner.link_experts=-1"):
        CpuFallback(NoPrefetch(), -1)
