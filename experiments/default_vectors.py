"""Measure the mean output of every expert on a recording: the default vectors of predictor=quasi_hidden.

    python -m experiments.default_vectors recording=outputs/recording output=models/bytes-moe/predictors/quasi_hidden.safetensors

Runs each expert on the router inputs that were recorded for the tokens routed to it. Writes the vectors and `default_vectors.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from experiments import launch
from experiments.atomic import write_json
from experiments.config import ModelConfig, repository_path
from experiments.expert_store import open_store
from experiments.model_view import load_model_view
from experiments.progress import progress_bar
from experiments.provenance import provenance
from predictors.base import LayerView
from predictors.quasi_hidden import default_vectors, save
from predictors.recording import Recording
from prefetch.errors import ConfigError


@dataclass
class DefaultVectorsConfig:
    """Options of `python -m experiments.default_vectors`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    recording: str = MISSING
    output: str | None = None
    split: str = MISSING
    max_rows: int = MISSING
    n_threads: int = MISSING


def main() -> None:
    ConfigStore.instance().store(name="default_vectors_schema", node=DefaultVectorsConfig)
    launch.run("default_vectors", measure)


@torch.inference_mode()
def measure(cfg: DictConfig, folder: Path) -> None:
    """Write the default vectors of `cfg.model` to `cfg.output`, and how they came about to `folder`."""
    for option in ("max_rows", "n_threads"):
        if cfg[option] < 1:
            raise ConfigError(f"{option}={cfg[option]}: it must be at least 1")
    torch.set_num_threads(cfg.n_threads)
    recording = Recording(repository_path(cfg.recording))
    model, geometry = load_model_view(cfg)
    recording.check_model(model)
    documents = recording.split(cfg.split)
    views = recording.rows(documents, cfg.max_rows)
    store = open_store(cfg.model)
    with progress_bar("measuring experts", geometry.n_total) as advance:
        vectors = default_vectors(views, model.n_experts, store.read_expert, advance, model.expert_forms)
    measured = {
        "command": "python -m experiments.default_vectors",
        "split": cfg.split,
        "tokens": len(views[0].token_ids),
        "experts_never_used": geometry.n_total - _n_used(views, model.n_experts),
    }
    output = repository_path(cfg.output) if cfg.output else folder / "quasi_hidden.safetensors"
    save(output, vectors, model, measured)
    about = {"config": OmegaConf.to_container(cfg, resolve=True), "provenance": provenance(0), **measured}
    write_json(folder / "default_vectors.json", about)
    launch.say(
        f"{geometry.n_total} default vectors from {measured['tokens']} tokens, {measured['experts_never_used']} experts never used: "
        f"{output}"
    )


def _n_used(views: list[LayerView], n_experts: int) -> int:
    """Experts of all layers that at least one token used."""
    return sum(int((torch.bincount(view.topk_ids.flatten(), minlength=n_experts) > 0).sum()) for view in views)


if __name__ == "__main__":
    main()
