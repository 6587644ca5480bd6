"""Never prefetch, whatever is predicted: predictions are recorded and measured, but cost the link nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from predictors.base import Prediction
from prefetch.geometry import ExpertKey
from prefetch.planner.base import FastTierView, Planner


@dataclass
class NoPrefetch(Planner):
    """Plans nothing."""

    def plan(self, predictions: Sequence[Prediction], tier: FastTierView) -> list[ExpertKey]:
        """An empty list."""
        return []
