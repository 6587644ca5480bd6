"""What a planner is: scores + cache state + link state -> an ordered list of prefetches. All cost models live here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from predictors.base import Prediction
from prefetch.geometry import ExpertKey, MoEGeometry


@dataclass(frozen=True)
class FastTierView:
    """What a planner may know of the fast tier and the link at the moment it is asked."""

    on_board: Callable[[ExpertKey], bool]  # the expert is in a slot or already on its way into one
    free_slots: int  # slots a prefetch may land in without evicting anything
    queued_bytes: int  # bytes submitted to the link and not yet moved
    useful_share: float = 1.0  # of recent prefetches, made or considered: how many a router confirmed; 1 while nothing is known
    consider: Callable[[ExpertKey], None] = lambda key: None  # judge an expert like a prefetch, without moving a byte


class Planner(ABC):
    """Chooses prefetches. Pure: no tensors beyond the scores, no threads, no clock."""

    def bind(self, geometry: MoEGeometry) -> None:
        """Called once before the first plan."""
        self.geometry = geometry

    @abstractmethod
    def plan(self, predictions: Sequence[Prediction], tier: FastTierView) -> list[ExpertKey]:
        """Experts to prefetch, most urgent first; at most `tier.free_slots` of them, none of them on board."""

    def leave_in_place(self, missing: Sequence[ExpertKey], tier: FastTierView) -> list[ExpertKey]:
        """Those of the `missing` experts of the layer in progress that are better computed where they lie, by the CPU or by a GPU
        across the link, than brought into slots (hybrid planners override this)."""
        return []
