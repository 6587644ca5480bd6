"""Measured: the machine of a run of `experiments.decode`, as far as that run's clock could see.

Computing takes what it took in the arm that moved nothing, a load what computing and books took longer in the arm that loaded
everything, and predicting what it took in the arm of the same name. What that run saw beside it, such as attention that is slower while experts
stream in, is not in these figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.machines.base import Link, Machine, at_least, link_of
from experiments.results import ArmResult, Results
from experiments.statistics import spread
from prefetch.costs import Costs
from prefetch.errors import ResultsError
from prefetch.geometry import MoEGeometry


@dataclass
class Measured(Machine):
    """Costs out of a result folder, and the link of that run unless another is given."""

    run: str  # folder that experiments.decode wrote, one sequence at a time
    arm: str = "resident"  # whose computing counts
    loading_arm: str | None = "on_demand"  # which loads every expert; null: a load costs nothing beside its transfer
    predictor_s: float | None = None  # at one layer; null: what the run's arm of the same name took
    link: Any = None  # any of {bytes_per_s, latency_s, chunk_bytes}; the rest is the run's

    def __post_init__(self) -> None:
        if self.predictor_s is not None:
            at_least("predictor_s", self.predictor_s, 0)
        self.results = Results.load(Path(self.run))
        if self.results.simulated or "tier" not in self.results.config:
            raise ResultsError(f"machine.run={self.run}: it was not measured; name a run of experiments.decode")
        if self.results.config["workload"]["batch_size"] != 1:
            raise ResultsError(
                f"machine.run={self.run}: it decoded several sequences at once; one with workload.batch_size=1 is needed"
            )

    def the_link(self) -> Link:
        """The run's, but for what `link` says."""
        tier = self.results.config["tier"]
        latency_s = tier["link"]["latency_s"] if tier["link"] else 0.0
        own = Link(self.results.provenance["link_bytes_per_s"], latency_s, tier["chunk_bytes"])
        if self.link is None:
            return own
        return link_of({**asdict(own), **self.link} if isinstance(self.link, Mapping) else self.link)

    def costs(self, geometry: MoEGeometry, dense_bytes: float | None, arm: str | None) -> Costs:
        """Medians over the repeats, of one layer of a decoded token; `dense_bytes` plays no part.

        Raises:
            ResultsError: the run is of another model, or lacks an arm.
        """
        n_total = round(self.results.slots / self.results.slots_fraction)
        if n_total != geometry.n_total:
            raise ResultsError(
                f"machine.run={self.run}: its model has {n_total} experts, that of the trace {geometry.n_total}; what computing takes is known "
                "of that model alone: choose a run of this one, or a machine from data sheets"
            )
        computing = self._arm(self.arm)
        dense_s, call_s, experts_s = (_layer_s(computing, part, geometry) for part in ("dense", "overhead", "expert"))
        expert_s = experts_s / geometry.top_k
        load_s = 0.0
        if self.loading_arm is not None:
            loading_s = sum(_layer_s(self._arm(self.loading_arm), part, geometry) for part in ("overhead", "expert"))
            load_s = max(0.0, loading_s - call_s - experts_s) / geometry.top_k
        in_place_s = expert_s if self._computes_where_experts_lie() else None
        return Costs(dense_s, call_s, expert_s, load_s, self._predictor_s(arm, geometry), in_place_s)

    def _computes_where_experts_lie(self) -> bool:
        """The CPU computed, and the backing tier was RAM: nothing is to be read first, and no GPU was faster."""
        return self.results.config["tier"]["kind"] == "host" and self.results.config["backend"]["kind"] == "torch"

    def _predictor_s(self, arm: str | None, geometry: MoEGeometry) -> float:
        if arm is None:
            return 0.0
        if self.predictor_s is None:
            return _layer_s(self._arm(arm), "predictor", geometry)
        return self.predictor_s

    def _arm(self, name: str) -> ArmResult:
        if name not in self.results.arms:
            arms = ", ".join(self.results.arms)
            raise ResultsError(
                f"machine.run={self.run}: it has no arm {name!r} but {arms}; name the arm alike, or set machine.arm, machine.loading_arm or "
                "machine.predictor_s"
            )
        return self.results.arms[name]


def _layer_s(arm: ArmResult, part: str, geometry: MoEGeometry) -> float:
    token_s = spread(arm.values("tpot_mean_s")).median
    return spread(arm.values(f"{part}_share")).median * token_s / geometry.n_layers
