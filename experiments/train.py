"""Train a predictor on a recording: weights as safetensors, learning curves, held-out recall.

    python -m experiments.train predictor=mlp recording=outputs/recording
    python -m experiments.train predictor=corrected_gate output=models/bytes-moe/predictors/corrected_gate.safetensors

Training documents are split by source (module, book, prompt): some sources are held out to stop early and to calibrate.
Documents of other splits are never read. Writes the weights and `training.json`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from hydra.utils import get_class, instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from experiments import launch
from experiments.atomic import write_json
from experiments.config import ModelConfig, TrackingConfig, check_knobs, repository_path
from experiments.model_view import load_model_view
from experiments.progress import progress_bar
from experiments.provenance import provenance
from experiments.tracking import Tracker
from predictors.fitting import FitOptions, FitReport, fit, recalls
from predictors.learned import LearnedPredictor
from predictors.recording import RecordedDocument, Recording
from prefetch.errors import ConfigError, RecordingError

DTYPES = ("float32", "bfloat16")


@dataclass
class TrainOptions(FitOptions):
    """How to train, and on what."""

    split: str = "training"
    held_out_one_in: int = 8
    max_rows: int = 131072
    dtype: str = "bfloat16"


@dataclass
class TrainConfig:
    """Options of `python -m experiments.train`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    predictor: Any = MISSING
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    recording: str = MISSING
    output: str | None = None
    n_threads: int = 2
    train: TrainOptions = field(default_factory=TrainOptions)


def main() -> None:
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    launch.run("train", train)


def train(cfg: DictConfig, folder: Path) -> None:
    """Train `cfg.predictor` and write its weights and `training.json`."""
    options = _checked(cfg)
    torch.set_num_threads(cfg.n_threads)
    if not issubclass(get_class(cfg.predictor._target_), LearnedPredictor):
        raise ConfigError(f"predictor={cfg.predictor._target_} is not trained: it needs no weights")
    predictor: LearnedPredictor = instantiate(cfg.predictor, weights=None)
    recording = Recording(repository_path(cfg.recording))
    model, _ = load_model_view(cfg)
    recording.check_model(model)
    learned_from, held_out = split_by_source(recording.split(options.split), options.held_out_one_in)
    training, judged = recording.rows(learned_from, options.max_rows), recording.rows(held_out, options.max_rows)

    tracker = Tracker(cfg.tracking.mode, cfg.tracking.project)
    tracker.start(OmegaConf.to_container(cfg, resolve=True), folder)  # type: ignore[arg-type]
    with progress_bar(f"training {predictor.name}", options.epochs) as advance:

        def report(epoch: int, figures: dict[str, float]) -> None:
            tracker.log({"epoch": epoch, **figures})
            advance()

        found = fit(predictor, model, training, judged, options, report)
    record = {
        "command": f"python -m experiments.train predictor={predictor.name}",
        "training_documents": len(learned_from),
        "training_tokens": len(training[0].token_ids),
        "held_out_tokens": len(judged[0].token_ids),
        "parameters": predictor.n_parameters(),
        "options": asdict(options),
        "fit": asdict(found),
    }
    weights = repository_path(cfg.output) if cfg.output else folder / f"{predictor.name}.safetensors"
    predictor.save(weights, {name: record[name] for name in ("training_documents", "training_tokens", "options")} | {
        "held_out_recall": max(found.recalls)}, getattr(torch, options.dtype))  # fmt: skip
    stored = instantiate(cfg.predictor, weights=str(weights))
    stored.bind(model)
    record["stored_recall_per_target"] = recalls(stored, judged)  # rounding to the stored dtype may cost something
    write_json(folder / "training.json", {"config": OmegaConf.to_container(cfg, resolve=True),
        "provenance": provenance(options.seed), "weights_bytes": weights.stat().st_size, **record})  # fmt: skip
    tracker.log({"best_held_out_recall": max(found.recalls), "seconds": found.seconds})
    tracker.finish()
    _print(predictor, found, weights)


def split_by_source(documents: list[RecordedDocument], one_in: int) -> tuple[list[RecordedDocument], list[RecordedDocument]]:
    """(to learn from, held out): every `one_in`-th source, in order of their names, is held out with all its documents.

    Raises:
        RecordingError: there are too few sources to hold one out.
    """
    sources = sorted({document.source for document in documents})
    held_out = set(sources[one_in - 1 :: one_in])
    if not held_out or len(held_out) == len(sources):
        raise RecordingError(
            f"too little data: the documents come from {len(sources)} sources, one in {one_in} cannot be held out; record more"
        )
    return [d for d in documents if d.source not in held_out], [d for d in documents if d.source in held_out]


def _checked(cfg: DictConfig) -> TrainOptions:
    check_knobs("predictor", cfg.predictor)
    options: TrainOptions = OmegaConf.to_object(cfg.train)  # type: ignore[assignment]
    for option, least in (("epochs", 1), ("patience", 1), ("batch_rows", 1), ("held_out_one_in", 2), ("max_rows", 1)):
        if getattr(options, option) < least:
            raise ConfigError(f"train.{option}={getattr(options, option)}: it must be at least {least}")
    if not options.learning_rate > 0:
        raise ConfigError(f"train.learning_rate={options.learning_rate}: it must be above 0")
    if options.dtype not in DTYPES:
        raise ConfigError(f"train.dtype={options.dtype}: choose one of {', '.join(DTYPES)}")
    if cfg.n_threads < 1:
        raise ConfigError(f"n_threads={cfg.n_threads}: it must be at least 1")
    return options


def _print(predictor: LearnedPredictor, found: FitReport, weights: Path) -> None:
    launch.say(
        f"{predictor.name}: held-out recall@k {found.recalls[0]:.3f} untrained, {max(found.recalls):.3f} after epoch "
        f"{found.best_epoch} of {len(found.losses)}, {found.seconds:.0f} s; {predictor.n_parameters()} parameters, "
        f"{weights.stat().st_size / 1e6:.2f} MB: {weights}"
    )


if __name__ == "__main__":
    main()
