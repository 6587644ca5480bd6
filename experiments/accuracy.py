"""Judge any set of predictors on the same recording: quality with intervals, cold quality, calibration, cost; tables and figures.

    python -m experiments.accuracy recording=outputs/recording
    python -m experiments.accuracy "predictors=[margin_gate,'gate_reuse lookahead=2','mlp weights=outputs/train/x/mlp.safetensors']"

A predictor is named by its file in conf/predictor, with knobs behind it. Guesses go through the same `predict` as live, on states
that were recorded, so live recall on the same tokens is the same number. Every figure is defined in docs/method.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console

from experiments import launch
from experiments.accuracy_plots import draw
from experiments.accuracy_tables import Tables, as_markdown, for_terminal, tables_of
from experiments.arm import preload_order
from experiments.atomic import write_json, write_text
from experiments.config import ModelConfig, TrackingConfig, check_knobs, compose_policy, repository_path
from experiments.findings import Courtroom, Findings, examine
from experiments.model_view import load_model_view
from experiments.progress import progress_bar
from experiments.provenance import provenance
from experiments.residency import Snapshots, all_snapshots
from experiments.tracking import Tracker
from experiments.train import split_by_source
from predictors.base import ModelView, Predictor
from predictors.recording import Recording
from prefetch.cache.warm_start import warm_start
from prefetch.errors import ConfigError
from prefetch.geometry import MoEGeometry
from prefetch.slots import parse_slots
from prefetch.trace import RoutingTrace


@dataclass
class AccuracyConfig:
    """Options of `python -m experiments.accuracy`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    recording: str = MISSING
    predictors: list[str] = field(default_factory=list)
    reference: str = MISSING
    splits: list[str] = field(default_factory=list)
    caches: dict[str, str] = field(default_factory=dict)
    calibration_split: str = MISSING
    calibration: str = MISSING
    held_out_one_in: int = MISSING
    bootstrap: int = MISSING
    n_threads: int = 1
    seed: int = 0


def main() -> None:
    ConfigStore.instance().store(name="accuracy_schema", node=AccuracyConfig)
    launch.run("accuracy", accuracy)


def accuracy(cfg: DictConfig, folder: Path) -> None:
    """Judge `cfg.predictors` and write tables, figures and `accuracy.json` to `folder`."""
    _check(cfg)
    torch.set_num_threads(cfg.n_threads)
    predictors = {label: compose_predictor(label, cfg.model.path) for label in cfg.predictors}
    court = _court(cfg)
    found: dict[str, Findings] = {}
    with progress_bar("judging predictors", len(predictors)) as advance:
        for label, predictor in predictors.items():
            found[label] = examine(label, predictor, court, cfg.calibration)
            advance()
    tables = tables_of(found, list(cfg.caches), cfg.reference, cfg.bootstrap, cfg.seed)
    _write(cfg, tables, found, court.geometry.top_k, folder)


def compose_predictor(label: str, model_path: str) -> Predictor:
    """The predictor that `label` describes: a file of conf/predictor, then knobs.

    Raises:
        ConfigError: an unknown file or knob, or a value of a wrong type.
    """
    name, *knobs = label.split()
    overrides = [f"+predictor={name}", f"+model.path={model_path}", *(f"++predictor.{knob}" for knob in knobs)]
    try:
        cfg = compose(overrides=overrides)
    except HydraException as error:
        raise ConfigError(f"predictors names {label!r}: {launch.one_line(error)}") from error
    check_knobs("predictor", cfg.predictor)
    predictor: Predictor = instantiate(cfg.predictor)
    return predictor


def _check(cfg: DictConfig) -> None:
    if not cfg.predictors:
        raise ConfigError("predictors is empty: name files of conf/predictor, e.g. 'predictors=[gate_reuse,margin_gate]'")
    if len(set(cfg.predictors)) < len(cfg.predictors):
        raise ConfigError("predictors names one twice")
    if cfg.reference not in cfg.predictors:
        raise ConfigError(f"reference={cfg.reference}: it must be one of predictors ({', '.join(cfg.predictors)})")
    if not cfg.splits or not cfg.caches:
        raise ConfigError("splits and caches must each name at least one")
    for option, least in (("bootstrap", 1), ("n_threads", 1), ("held_out_one_in", 2)):
        if cfg[option] < least:
            raise ConfigError(f"{option}={cfg[option]}: it must be at least {least}")


def _court(cfg: DictConfig) -> Courtroom:
    recording = Recording(repository_path(cfg.recording))
    model, geometry = load_model_view(cfg)
    recording.check_model(model)
    documents = {split: recording.split(split) for split in cfg.splits}
    _, calibration = split_by_source(recording.split(cfg.calibration_split), cfg.held_out_one_in)
    held = {}
    with progress_bar("replaying caches", len(documents)) as advance:
        for split, group in documents.items():
            held[split] = _held(cfg, [recording.trace(document) for document in group], model, geometry)
            advance()
    return Courtroom(recording, model, geometry, documents, held, calibration)


def _held(cfg: DictConfig, traces: list[RoutingTrace], model: ModelView, geometry: MoEGeometry) -> dict[str, list[Snapshots]]:
    """Per cache of `cfg.caches`, what it holds while the documents run; every split begins with an empty or preloaded cache."""
    found = {}
    for name, description in cfg.caches.items():
        policy_name, *knobs = description.split()
        given = [f"+model.path={cfg.model.path}", *(f"cache.{knob}" for knob in knobs)]
        cache = compose(overrides=[f"+cache={policy_name}", *given]).cache
        n_slots = parse_slots(cache.slots, geometry, f"caches.{name}: slots")
        policy = compose_policy(cache, n_slots, geometry.n_layers)
        warm_start(policy, preload_order(cache, model))
        found[name] = all_snapshots(policy, traces)
    return found


def _write(cfg: DictConfig, tables: Tables, found: dict[str, Findings], top_k: int, folder: Path) -> None:
    """Everything to `folder` and to wandb; the comparison also to the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    write_text(folder / "accuracy.md", as_markdown(tables, top_k, list(cfg.caches)))
    curves = {(label, split): curve for label, f in found.items() for split, curve in f.curves.items()}
    images = draw(tables, curves, top_k, folder)
    tracker = Tracker(cfg.tracking.mode, cfg.tracking.project)
    tracker.start({str(key): value for key, value in config.items()}, folder)
    for name, table in tables.named().items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
        tracker.log_table(name, table)
    for image in images:
        tracker.log_image(image.stem, image)
    tracker.finish()
    contents = {name: _records(table) for name, table in tables.named().items()}
    write_json(folder / "accuracy.json", {"config": config, "provenance": provenance(cfg.seed), **contents})
    Console().print(for_terminal(tables, top_k, list(cfg.caches)))
    launch.say(f"results: {folder}; all columns: accuracy.md there")


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(column): value for column, value in row.items()} for row in table.to_dict("records")]


if __name__ == "__main__":
    main()
