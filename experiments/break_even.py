"""Break-even maps: from which link and which accuracy of guesses on does prefetch pay? Simulated, by replaying one trace many times.

    python -m experiments.break_even trace=outputs/decode/RUN/trace_slru.safetensors machine=measured machine.run=outputs/decode/RUN
    python -m experiments.break_even trace=TRACE shape=gpt_oss_20b machine=pcie4_12gb 'links=[10e9,25e9,50e9]' 'slots=[0.25,0.5]'

For every budget and link: the cache alone, then an oracle that names each true expert with a given probability, and the bounds of the link.
Your predictor's recall@k (`experiments.accuracy`) is where to read the map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import launch
from experiments.atomic import write_json, write_text
from experiments.break_even_map import draw
from experiments.config import validate_replay
from experiments.machines.base import Link, Machine
from experiments.progress import progress_bar
from experiments.provenance import provenance
from experiments.replayed_arm import expert_bytes, read_trace, run_arm
from experiments.slot_budget import slot_budget
from prefetch.cache.fewest_loads import fewest_loads
from prefetch.errors import CapacityError, ConfigError
from prefetch.geometry import MoEGeometry
from prefetch.replay import geometry_of
from prefetch.trace import RoutingTrace

WORTH_IT = 1.3  # times the cache alone: what the field asks prefetch for
NO_PREDICTOR = {"_target_": "predictors.none.NoPredictor"}


@dataclass(frozen=True)
class Point:
    """One replay of the map; accuracy None is the cache alone."""

    slots: float
    link_bytes_per_s: float
    accuracy: float | None


def main() -> None:
    launch.run("break_even", break_even)


def break_even(cfg: DictConfig, folder: Path) -> None:
    """Replay all points of `cfg`, and write table, map and thresholds to `folder`."""
    check(cfg)
    trace = read_trace(cfg)
    geometry = geometry_of(trace, expert_bytes(cfg, trace))
    points = [Point(*where) for where in product(cfg.slots, map(float, cfg.links), [None, *cfg.accuracies])]
    rows = []
    with progress_bar("replaying", len(points)) as advance:
        for row in replayed(cfg, points, trace, geometry):
            rows.append(row)
            advance()
    table = speed_ups(pd.DataFrame(rows))
    folder.mkdir(parents=True, exist_ok=True)
    found = thresholds(table)
    write_text(folder / "break_even.csv", table.to_csv(index=False, float_format="%.6g"))
    draw(table, title(cfg, trace), folder / "break_even.png")
    config = OmegaConf.to_container(cfg, resolve=True)
    said = provenance(cfg.seed) | {"routing": trace.metadata}
    write_json(
        folder / "break_even.json",
        {"simulated": True, "config": config, "provenance": said, "thresholds": found.to_dict("records")},
    )
    Console().print(rich_thresholds(found, title(cfg, trace)))
    launch.say(f"results: {folder}")


def check(cfg: DictConfig) -> None:
    """Raise ConfigError, naming the option, unless the map can be drawn."""
    validate_replay(cfg)
    if cfg.n_jobs != -1 and cfg.n_jobs < 1:
        raise ConfigError(f"n_jobs={cfg.n_jobs}: it must be at least 1, or -1 for one per processor")
    for option in ("links", "accuracies", "slots"):
        values = cfg[option]
        if not OmegaConf.is_list(values) or not len(values) or not all(isinstance(v, int | float) for v in values):
            raise ConfigError(f"{option}={values}: it must be a list of numbers")
        if list(values) != sorted(set(values)) or len(values) < (1 if option == "slots" else 2):
            raise ConfigError(f"{option}={list(values)}: it must rise, without repeats, from one end of the map to the other")
    for option in ("accuracies", "slots"):
        if not all(0 <= value <= 1 for value in cfg[option]):
            raise ConfigError(f"{option}={list(cfg[option])}: each must be from 0 to 1")


def replayed(
    cfg: DictConfig, points: Sequence[Point], trace: RoutingTrace, geometry: MoEGeometry
) -> Iterator[dict[str, float]]:
    """The figures of every point, in order.

    Raises:
        CapacityError: a process that replayed was killed.
    """
    n_jobs = 1 if len(points) < 8 else cfg.n_jobs
    machine: Machine = instantiate(cfg.machine)
    cfgs = [configured(cfg, point, machine.the_link()) for point in points]
    n_slots = {point.slots: slot_budget(at_point, geometry).n_slots for point, at_point in zip(points, cfgs, strict=True)}
    n_loads = {slots: fewest_loads(trace, n, cfg.warmup_sequences) for slots, n in n_slots.items()}
    work = (
        delayed(figures)(at_point, point, trace, geometry, n_loads[point.slots])
        for point, at_point in zip(points, cfgs, strict=True)
    )
    try:
        yield from Parallel(n_jobs=n_jobs, return_as="generator")(work)
    except TerminatedWorkerError as error:
        raise CapacityError(
            "a process that replayed was killed, most likely for want of memory: lower n_jobs or max_sequences"
        ) from error


def configured(cfg: DictConfig, point: Point, link: Link) -> DictConfig:
    """`cfg` at one point of the map, over `link` but for its bandwidth."""
    oracle = {"_target_": "predictors.oracle.Oracle", "accuracy": point.accuracy, "lookahead": cfg.lookahead, "seed": cfg.seed}
    at_point = cfg.copy()
    OmegaConf.set_struct(at_point, False)
    at_point.predictor = NO_PREDICTOR if point.accuracy is None else oracle
    at_point.cache.slots = point.slots
    at_point.machine.link = asdict(replace(link, bytes_per_s=point.link_bytes_per_s))
    return at_point


def figures(cfg: DictConfig, point: Point, trace: RoutingTrace, geometry: MoEGeometry, n_loads: int) -> dict[str, float]:
    """One replay: what it found, and the bounds of its link, where `n_loads` experts must be loaded at least."""
    run = run_arm("oracle", cfg, trace, geometry)
    found = run.figures(cfg.warmup_sequences)
    names = ("tokens_per_s", "stall_share", "hit_rate", "late_rate", "miss_rate", "wasted_bytes_per_token")
    return {
        "slots": point.slots,
        "link_bytes_per_s": point.link_bytes_per_s,
        "load_per_layer": run.link.load_s(geometry.expert.row_bytes) / run.layer_s(cfg.warmup_sequences),
        "accuracy": np.nan if point.accuracy is None else point.accuracy,
        **{name: found[name] for name in names},
        "overlap_tokens_per_s": run.overlapped(geometry, cfg.warmup_sequences),
        "belady_overlap_tokens_per_s": run.overlapped(geometry, cfg.warmup_sequences, n_loads),
    }


def speed_ups(table: pd.DataFrame) -> pd.DataFrame:
    """The points with guesses, each beside the cache alone at the same link and slots: `ratio`, and the bounds on it (see `tables.py`)."""
    where = ["slots", "link_bytes_per_s"]
    alone = table[table["accuracy"].isna()].set_index(where)
    speeds = ["tokens_per_s", "overlap_tokens_per_s", "belady_overlap_tokens_per_s"]
    guessed = table[table["accuracy"].notna()].drop(columns=speeds[1:])
    guessed = guessed.join(alone[speeds].add_prefix("alone_"), on=where)
    base = guessed["alone_tokens_per_s"]
    bounds = {bound: guessed[f"alone_{bound}_tokens_per_s"] / base for bound in ("overlap", "belady_overlap")}
    return guessed.assign(ratio=guessed["tokens_per_s"] / base, **bounds)


def thresholds(table: pd.DataFrame) -> pd.DataFrame:
    """Per slots and link: from which accuracy on prefetch gains anything, and WORTH_IT; NaN where it never does."""
    rows = []
    for (slots, link), group in table.groupby(["slots", "link_bytes_per_s"], sort=True):
        group = group.sort_values("accuracy")
        accuracy, ratio = group["accuracy"].to_numpy(), group["ratio"].to_numpy()
        rows.append(
            {
                "slots": slots,
                "link_bytes_per_s": link,
                "load_per_layer": group["load_per_layer"].iloc[0],
                "alone_tokens_per_s": group["alone_tokens_per_s"].iloc[0],
                "pays_from": crossing(accuracy, ratio, 1.0),
                "worth_it_from": crossing(accuracy, ratio, WORTH_IT),
                "best_ratio": ratio.max(),
                "overlap": group["overlap"].iloc[0],
                "belady_overlap": group["belady_overlap"].iloc[0],
            }
        )
    return pd.DataFrame(rows)


def crossing(accuracy: Sequence[float] | np.ndarray, ratio: Sequence[float] | np.ndarray, level: float) -> float:
    """The least accuracy from which on `ratio` stays above `level`, between points by a straight line; NaN if it is not above it in the end."""
    if not ratio[-1] > level:
        return np.nan
    above = float(accuracy[-1])
    for (lower, low), (upper, high) in reversed(list(pairwise(zip(accuracy, ratio, strict=True)))):
        if low > level:
            above = float(lower)
            continue
        return float(lower + (upper - lower) * (level - low) / (high - low))
    return above


def title(cfg: DictConfig, trace: RoutingTrace) -> str:
    """What is shown, and that it is simulated."""
    policy = cfg.cache._target_.rsplit(".", 1)[1].lower()
    routing = trace.metadata.get("model") or Path(cfg.trace).name
    return f"prefetch against {policy} alone, simulated: routing of {routing}, sizes {cfg.shape.name}"


def rich_thresholds(found: pd.DataFrame, heading: str) -> Table:
    """The thresholds for a terminal."""
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    columns = (
        "slots\n%",
        "link\nGB/s",
        "load /\nlayer",
        "alone\ntokens/s",
        "pays\nfrom\nrecall %",
        f"{WORTH_IT} ×\nfrom\nrecall %",
        "best\n×",
        "overlap\n×",
        "belady_\noverlap ×",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.to_dict("records"):
        table.add_row(*cells(row))
    return table


def cells(row: dict[Any, float]) -> list[str]:
    """One row of thresholds as text."""
    pays, worth = (("never" if np.isnan(row[name]) else f"{100 * row[name]:.0f}") for name in ("pays_from", "worth_it_from"))
    return [
        f"{100 * row['slots']:.0f}",
        f"{row['link_bytes_per_s'] / 1e9:g}",
        f"{row['load_per_layer']:.2f}",
        f"{row['alone_tokens_per_s']:.1f}",
        pays,
        worth,
        f"{row['best_ratio']:.2f}",
        f"{row['overlap']:.2f}",
        f"{row['belady_overlap']:.2f}",
    ]


if __name__ == "__main__":
    main()
