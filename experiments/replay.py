"""Replay recorded routing under any link, machine, cache, predictor and planner: simulated, without the model.

    python -m experiments.replay trace=outputs/decode/RUN/trace_slru.safetensors machine.run=outputs/decode/RUN machine.predictor_s=50e-6
    python -m experiments.replay trace=TRACE shape=qwen3_30b_a3b machine=pcie4_12gb cache.slots=0.25 predictor=previous_token
    python -m experiments.replay --help

The runtime is the one that decodes; only clock, transfers and computing differ (`prefetch/replay.py`). Every arm stands beside the
bounds: no cache, an oracle, everything resident, Belady's hits, and loads that are hidden as far as the link allows.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments import launch
from experiments.after_warmup import counted_calls, trace_after
from experiments.against_measured import against_measured, rich_against_measured, unlike
from experiments.arms import compose_arms, roles
from experiments.atomic import write_text
from experiments.config import validate_replay
from experiments.machines.measured import Measured
from experiments.progress import progress_bar
from experiments.provenance import provenance
from experiments.replayed_arm import ReplayedArm, expert_bytes, read_trace, run_arm
from experiments.results import BASELINE, BELADY, BELADY_OVERLAP, OVERLAP, ArmResult, Quality, Results
from experiments.run_folder import write_folder
from experiments.slot_budget import slot_budget
from prefetch.cache.belady import belady_hits
from prefetch.cache.fewest_loads import fewest_loads
from prefetch.errors import ConfigError
from prefetch.geometry import MoEGeometry
from prefetch.replay import geometry_of
from prefetch.trace import RoutingTrace

OF_THE_WHOLE_RUN = ("trace", "shape", "warmup_sequences", "max_sequences")


def main() -> None:
    launch.run("replay", replay_arms)


def replay_arms(cfg: DictConfig, folder: Path) -> None:
    """Replay all arms of `cfg` and write results, tables, plots, timelines and traces to `folder`."""
    validate_replay(cfg)
    cfgs = compose_arms(cfg, partial(_check_arm, cfg))
    trace = read_trace(cfg)
    geometry = geometry_of(trace, expert_bytes(cfg, trace))
    with progress_bar("replaying", len(cfgs) * len(trace.forwards())) as advance:
        runs = {name: run_arm(name, arm_cfg, trace, geometry, advance) for name, arm_cfg in cfgs.items()}
    results = _results(cfg, cfgs, runs, trace, geometry)
    compared = _compare(cfg, results, folder)
    write_folder(results, runs, folder, cfg.tracking, n_warmup=cfg.warmup_sequences, timeline_forwards=cfg.timeline_forwards)
    if compared is not None:
        Console().print(rich_against_measured(compared))


def _check_arm(cfg: DictConfig, arm_cfg: DictConfig) -> None:
    validate_replay(arm_cfg)
    for option in OF_THE_WHOLE_RUN:
        if arm_cfg[option] != cfg[option]:
            raise ConfigError(f"{option}: every arm replays the same trace of the same model; give it to the whole run")


def _compare(cfg: DictConfig, results: Results, folder: Path) -> pd.DataFrame | None:
    """Simulated beside measured figures, written to `folder`; None where it is not that run again."""
    machine = instantiate(cfg.machine)
    if not isinstance(machine, Measured) or machine.link is not None:
        return None
    different = unlike(results, machine.results)
    if different:
        launch.say(f"not compared with what {cfg.machine.run} measured: {', '.join(different)}")
        return None
    table = against_measured(results, machine.results)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "against_measured.csv", table.to_csv(index=False, float_format="%.6g"))
    return table


def _results(
    cfg: DictConfig, cfgs: dict[str, DictConfig], runs: dict[str, ReplayedArm], trace: RoutingTrace, geometry: MoEGeometry
) -> Results:
    role_of = roles(cfgs)
    baseline = next((name for name, role in role_of.items() if role == BASELINE), None)
    first = baseline or next(iter(cfgs))
    budget = slot_budget(cfgs[first], geometry)
    counted = counted_calls(trace, cfg.warmup_sequences)
    bounds = {BELADY: belady_hits(trace.routing_events(), budget.capacity, counted).hit_rate}
    if baseline is not None:
        n_loads = fewest_loads(trace, budget.n_slots, cfg.warmup_sequences)
        bounds[OVERLAP] = runs[baseline].overlapped(geometry, cfg.warmup_sequences)
        bounds[BELADY_OVERLAP] = runs[baseline].overlapped(geometry, cfg.warmup_sequences, n_loads)
    return Results(
        config=OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
        provenance=provenance(cfg.seed) | {"routing": trace.metadata, "machines": _machines(runs)},
        arms={
            name: ArmResult(
                role_of[name],
                [run.figures(cfg.warmup_sequences)],
                Quality.of(trace_after(run.trace, cfg.warmup_sequences)),
                lossless=False,
                emulated=False,
            )
            for name, run in runs.items()
        },
        bounds=bounds,
        slots=budget.n_slots,
        slots_fraction=budget.n_slots / geometry.n_total,
        simulated=True,
    )


def _machines(runs: dict[str, ReplayedArm]) -> dict[str, dict[str, object]]:
    """What each arm was charged; a measured machine's figures stand in no configuration."""
    return {name: {"costs": dataclasses.asdict(run.costs), "link": dataclasses.asdict(run.link)} for name, run in runs.items()}


if __name__ == "__main__":
    main()
