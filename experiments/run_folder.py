"""What a comparison leaves behind: tables, plots, timelines, traces, wandb's record, and last of all `results.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pandas as pd
from omegaconf import DictConfig
from rich.console import Console

from experiments import launch, plots, tables
from experiments.atomic import write_text
from experiments.progress import with_progress
from experiments.results import BASELINE, Results
from experiments.timeline import write_timeline
from experiments.tracking import Tracker
from prefetch.recorder import RunRecord
from prefetch.trace import RoutingTrace

TRACKED = ("tokens_per_s", "ratio", "hit_rate", "recall", "stall_share")


class FinishedRun(Protocol):
    """One arm's run, whether it was measured or replayed."""

    record: RunRecord
    predictor_failed: bool

    @property
    def trace(self) -> RoutingTrace: ...


def write_folder(
    results: Results,
    runs: Mapping[str, FinishedRun],
    folder: Path,
    tracking: DictConfig,
    *,
    n_warmup: int,
    timeline_forwards: int,
) -> None:
    """Write everything about a finished comparison to `folder`, and its tables to the screen.

    Args:
        runs: of each arm, the one that is kept whole.
        n_warmup: sequences that come before what is drawn.
        timeline_forwards: forward passes in each timeline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(tracking.mode, tracking.project)
    tracker.start(results.config, folder)
    for name, run in with_progress("writing", list(runs.items())):
        _write_arm(name, run, results.arms[name].role, folder, n_warmup, timeline_forwards)
    tables.write_comparison(results, folder)
    images = [folder / "time_breakdown.png", folder / "recall_per_layer.png", folder / "tokens_per_s.png"]
    plots.time_breakdown(results, images[0])
    plots.recall_per_layer(results, images[1])
    plots.tokens_per_s_vs_slots([results], images[2])
    _track(tracker, results, images)
    results.save(folder)  # last: a folder with results.json is complete
    screen = Console()
    screen.print(tables.rich_comparison(results, screen.width))
    for name, run in runs.items():
        if run.predictor_failed:
            launch.say(
                f"warning: the predictor of arm {name} failed and was switched off; its figures are those without prefetch"
            )
    launch.say(f"results: {folder}")


def _write_arm(name: str, run: FinishedRun, role: str, folder: Path, n_warmup: int, timeline_forwards: int) -> None:
    forwards = run.record.forwards
    write_timeline(
        run.record, folder / f"timeline_{name}.json", int((forwards["sequence"] < n_warmup).sum()), timeline_forwards
    )
    if run.trace.guesses or role == BASELINE:
        run.trace.save(folder / f"trace_{name}.safetensors")
    write_text(folder / f"calls_{name}.csv", run.record.calls.to_csv(index=False))
    write_text(folder / f"transfers_{name}.csv", run.record.transfers.to_csv(index=False))


def _track(tracker: Tracker, results: Results, images: list[Path]) -> None:
    table = tables.comparison(results)
    metrics = {
        f"{row['arm']}/{column}": row[column]
        for row in table.to_dict("records")
        for column in TRACKED
        if pd.notna(row.get(column))
    }
    tracker.log(metrics)
    tracker.log_table("comparison", table)
    for image in images:
        if image.exists():
            tracker.log_image(image.stem, image)
    tracker.finish()
