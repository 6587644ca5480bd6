"""One comparison out of any set of result folders.

    python -m experiments.report runs=[outputs/a,outputs/b] output=outputs/report
    python -m experiments.report 'runs=[multirun/decode/default/*]'

Writes report.md (tables, pictures, and what the runs differ in), comparison.csv (all arms of all runs) and the pictures.
"""

from __future__ import annotations

import dataclasses
import glob
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from experiments import launch
from experiments.atomic import write_text
from experiments.plots import recall_per_layer, time_breakdown, tokens_per_s_vs_slots
from experiments.results import FILE_NAME, Results
from experiments.tables import comparison, markdown_comparison
from prefetch.errors import ConfigError

OF_EVERY_RUN = ("time", "command", "load_average")  # differ between any two runs


@dataclass
class ReportConfig:
    """Options of `python -m experiments.report`."""

    runs: list[str] = field(default_factory=list)
    output: str = ""


def main() -> None:
    ConfigStore.instance().store(name="report_schema", node=ReportConfig)
    launch.run("report", report)


def report(cfg: DictConfig, output: Path) -> None:
    """Compare the runs that `cfg.runs` names, into `output`."""
    folders, without_results = find_runs(cfg.runs)
    for folder in without_results:
        print(f"left out, no {FILE_NAME}: {folder}", file=sys.stderr)
    runs = with_distinct_names([Results.load(folder) for folder in folders], folders)
    _check_one_kind(runs)
    print(write_report(runs, output)[0])


def write_report(runs: Sequence[Results], output: Path) -> list[Path]:
    """Write the comparison of `runs` into `output`; returns the files, report.md first."""
    runs = sorted(runs, key=lambda run: (run.slots_fraction, run.name))
    report, table, speed = output / "report.md", output / "comparison.csv", output / "tokens_per_s_vs_slots.png"
    numbers = pd.concat([comparison(run) for run in runs], ignore_index=True)
    write_text(table, numbers.to_csv(index=False, float_format="%.6g"))
    tokens_per_s_vs_slots(runs, speed)
    sections, pictures = [], []
    for run in runs:
        recall, time = (output / f"{run.name}_{kind}.png" for kind in ("recall_per_layer", "time_breakdown"))
        recall_per_layer(run, recall)
        time_breakdown(run, time)
        pictures += [recall, time]
        sections.append(_section(run, [time, recall]))
    write_text(report, "\n".join([f"# {len(runs)} runs\n", _differences(runs), f"![]({speed.name})\n", *sections]))
    return [report, table, speed, *pictures]


def find_runs(patterns: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Result folders that `patterns` name, each once; and folders that a pattern matched although they hold no results.

    Raises:
        ConfigError: there is no pattern, or one that matches no folder with results.
    """
    if not patterns:
        raise ConfigError("runs is empty: name result folders, e.g. runs=[outputs/a,outputs/b]")
    found: list[Path] = []
    empty: list[Path] = []
    for pattern in patterns:
        matches = sorted(Path(match) for match in glob.glob(pattern) if Path(match).is_dir())
        finished = [folder for folder in matches if (folder / FILE_NAME).exists()]
        if not glob.has_magic(pattern):
            finished = [Path(pattern)]  # named by itself: what is wrong with it is an error, told by Results.load
        elif not finished:
            raise ConfigError(f"runs: {pattern!r} matches {len(matches)} folders, none of which holds a {FILE_NAME}")
        found += finished
        empty += [folder for folder in matches if glob.has_magic(pattern) and folder not in finished]
    return list(dict.fromkeys(found)), list(dict.fromkeys(empty))


def with_distinct_names(runs: Sequence[Results], folders: Sequence[Path]) -> list[Results]:
    """The runs under names that tell them apart: as much of each folder's path, from its end, as that needs."""
    paths = [folder.resolve().parts for folder in folders]
    depth = next(d for d in range(1, max(map(len, paths)) + 1) if len({p[-d:] for p in paths}) == len(paths))
    names = ["-".join(part.strip("/") for part in parts[-depth:]) for parts in paths]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _check_one_kind(runs: Sequence[Results]) -> None:
    """Raise ConfigError where some of `runs` were measured and others simulated: one line through both would show neither."""
    simulated = [run.name for run in runs if run.simulated]
    if 0 < len(simulated) < len(runs):
        raise ConfigError(
            f"runs: {', '.join(simulated)} simulated, the others measured: compare each kind by itself, and a replay with the run that it stands "
            "in for by python -m experiments.replay experiment=as_measured run=FOLDER"
        )


def _section(run: Results, pictures: Sequence[Path]) -> str:
    images = "\n".join(f"![]({picture.name})" for picture in pictures)
    command = run.provenance.get("command", "not recorded")
    return f"## {run.name}\n\n{markdown_comparison(run)}\n{images}\n\nMade by `{command}`\n"


def _differences(runs: Sequence[Results]) -> str:
    """What the runs were not equal in: options, machine and code."""
    lines = []
    for title, part in (("Options", "config"), ("Machine and code", "provenance")):
        tables = [_flat(getattr(run, part)) for run in runs]
        names = dict.fromkeys(name for table in tables for name in table if name not in OF_EVERY_RUN)
        values = {name: [table.get(name, "absent") for table in tables] for name in names}
        differing = {name: found for name, found in values.items() if len(set(found)) > 1}
        if differing:
            lines.append(f"{title} that differ between these runs:\n")
        for name, found in differing.items():
            by_run = (f"{value} ({run.name})" for value, run in zip(found, runs, strict=True))
            lines.append(f"- `{name}`: {'; '.join(by_run)}")
    if len({run.provenance.get("hardware", {}).get("cpu") for run in runs}) > 1:
        lines.append("\n**Measured on different machines: compare arms within a run, not speeds between runs.**")
    return "\n".join(lines) + "\n" if lines else ""


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Leaves of nested dictionaries under dotted names, as text."""
    leaves: dict[str, str] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": str(value)}
    return leaves


if __name__ == "__main__":
    main()
