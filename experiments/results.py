"""The result folder's format: what `results.json` holds, typed. Experiments write it; tables, plots and reports read it.

The file:
    {"schema": 1, "config": {...}, "provenance": {...}, "slots": 64, "slots_fraction": 0.25, "quantised": null, "peak_rss_bytes": 1000000000,
     "simulated": false, "bounds": {"belady_hit_rate_simulated": 0.71},
     "arms": {"slru": {"role": "baseline", "repeats": [{"tokens_per_s": 41.2, ...}, ...], "lossless": true,
                       "emulated": false, "quality": null | {"overall": [{...}], "per_layer": [{...}]}}, ...}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.atomic import write_json
from predictors.evaluation import OVERALL, PER_LAYER, count_guesses, quality
from prefetch.errors import ResultsError

if TYPE_CHECKING:  # reading results needs no torch
    from prefetch.trace import RoutingTrace

SCHEMA = 1
FILE_NAME = "results.json"
BASELINE, PREDICTOR, BOUND = ROLES = ("baseline", "predictor", "bound")  # in the order of tables and legends
ORACLE = "oracle"  # name of the bound whose gain over the baseline predictors are measured by
BELADY = "belady_hit_rate_simulated"  # names among `Results.bounds`
OVERLAP = "overlap_tokens_per_s_simulated"  # the baseline's own loads, hidden as far as the link allows
BELADY_OVERLAP = "belady_overlap_tokens_per_s_simulated"  # the loads that not even Belady's cache avoids, likewise


@dataclass(frozen=True)
class Quality:
    """Rows of `predictors.evaluation.quality` of one arm, as plain dictionaries."""

    overall: list[dict[str, Any]]
    per_layer: list[dict[str, Any]]

    @classmethod
    def of(cls, trace: RoutingTrace) -> Quality | None:
        """The quality of the guesses in `trace`; None where it holds none."""
        if not trace.guesses:
            return None
        counts = count_guesses(trace)
        return cls(_records(quality(counts, OVERALL)), _records(quality(counts, PER_LAYER)))

    def decode(self) -> dict[str, Any]:
        """The overall row of the decode phase at the nearest lookahead; empty where nothing was decoded."""
        rows = [row for row in self.overall if row["phase"] == "decode"]
        return min(rows, key=lambda row: row["lookahead"], default={})

    def decode_per_layer(self) -> pd.DataFrame:
        """The per-layer rows of the decode phase at the nearest lookahead, in layer order."""
        table = pd.DataFrame(self.per_layer)
        decode = table[(table["phase"] == "decode")] if len(table) else table
        return decode[decode["lookahead"] == decode["lookahead"].min()].sort_values("layer") if len(decode) else decode


@dataclass(frozen=True)
class ArmResult:
    """One arm of a comparison. Repeat i of every arm ran beside repeat i of the others, so that they can be paired."""

    role: str  # one of ROLES
    repeats: list[dict[str, float]]  # `prefetch.accounting.summarise` of each repeat; what is absent was not measured
    quality: Quality | None  # None: no guesses were made
    lossless: bool  # its tokens were compared with the unmodified model's and equal them; in a replay there are none
    emulated: bool  # an emulated link paced its transfers

    def values(self, metric: str) -> list[float]:
        """One metric over the repeats; NaN where it was not measured."""
        return [repeat.get(metric, math.nan) for repeat in self.repeats]


@dataclass(frozen=True)
class Results:
    """What one run of an experiment found."""

    config: dict[str, Any]
    provenance: dict[str, Any]
    arms: dict[str, ArmResult]
    bounds: dict[str, float]  # figures of replays, never of a clock; their names say so
    slots: int
    slots_fraction: float  # of all experts
    quantised: str | None = None  # format of the experts where it is lossy against the original model, e.g. "int4 per 32"
    peak_rss_bytes: int | None = None  # of the whole process, all arms
    simulated: bool = False  # nothing was measured: recorded routing was replayed, and time is arithmetic
    name: str = field(default="", compare=False)  # the folder it was read from

    def baseline(self) -> ArmResult | None:
        """The arm that others are compared with: caching alone, no prefetch."""
        return next((arm for arm in self.arms.values() if arm.role == BASELINE), None)

    def oracle(self) -> ArmResult | None:
        """The arm that knows what comes."""
        return self.arms.get(ORACLE)

    def ordered(self) -> list[tuple[str, ArmResult]]:
        """All arms in the order of every table and legend: the baseline, predictors as run, bounds."""
        return sorted(self.arms.items(), key=lambda item: ROLES.index(item[1].role))

    @property
    def emulated(self) -> bool:
        return any(arm.emulated for arm in self.arms.values())

    def save(self, folder: Path) -> None:
        """Write `results.json` into `folder`, atomically."""
        content = asdict(self)
        del content["name"]
        write_json(folder / FILE_NAME, {"schema": SCHEMA, **content})

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read the results in `folder`.

        Raises:
            ResultsError: there are none, or the file is damaged, of another program or of another version.
        """
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ResultsError(f"{folder}: no {FILE_NAME} in it; name the output folder of a finished run") from None
        except (OSError, ValueError) as error:
            raise ResultsError(f"{path}: damaged or not readable ({error}); run the experiment again") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise ResultsError(f"{path}: not results of this version (its schema is {found!r}, expected {SCHEMA})")
        try:
            return _from_json(content, folder.name)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ResultsError(f"{path}: damaged ({type(error).__name__}: {error}); run the experiment again") from error


def legend_order(runs: Iterable[Results]) -> list[str]:
    """Every arm of `runs` once, in the order of all tables and legends."""
    first_role: dict[str, str] = {}
    for run in runs:
        for name, arm in run.ordered():
            first_role.setdefault(name, arm.role)
    return sorted(first_role, key=lambda name: ROLES.index(first_role[name]))


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(column): value for column, value in row.items()} for row in table.to_dict("records")]


def _from_json(content: dict[str, Any], name: str) -> Results:
    arms = {arm: _arm_from_json(fields) for arm, fields in content["arms"].items()}
    if sum(arm.role == BASELINE for arm in arms.values()) > 1:
        raise ValueError("more than one arm has the role 'baseline'")
    return Results(
        config=dict(content["config"]),
        provenance=dict(content["provenance"]),
        arms=arms,
        bounds={bound: _number(value) for bound, value in content["bounds"].items()},
        slots=int(content["slots"]),
        slots_fraction=float(content["slots_fraction"]),
        quantised=content.get("quantised"),
        peak_rss_bytes=content.get("peak_rss_bytes"),
        simulated=bool(content.get("simulated", False)),
        name=name,
    )


def _arm_from_json(fields: dict[str, Any]) -> ArmResult:
    if fields["role"] not in ROLES:
        raise ValueError(f"role {fields['role']!r} is none of {', '.join(ROLES)}")
    found = fields["quality"]
    return ArmResult(
        role=fields["role"],
        repeats=[{metric: _number(value) for metric, value in repeat.items()} for repeat in fields["repeats"]],
        quality=None if found is None else Quality(_filled(found["overall"]), _filled(found["per_layer"])),
        lossless=bool(fields["lossless"]),
        emulated=bool(fields["emulated"]),
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _filled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with NaN where JSON had to say null."""
    return [{column: math.nan if value is None else value for column, value in row.items()} for row in rows]
