"""Count how many tokens of a recording each expert served: the table that cache.preload=hot_experts fills a cache from.

    python -m experiments.hot_experts recording=outputs/recording output=models/bytes-moe/predictors/hot_experts.safetensors

Writes the table and `hot_experts.json`, which also says what share of other documents' activations the hottest experts serve.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from torch import Tensor

from experiments import launch
from experiments.atomic import write_json
from experiments.config import ModelConfig, repository_path
from experiments.model_view import load_model_view
from experiments.provenance import provenance
from predictors.hot_experts import hottest_first, save, token_counts
from predictors.recording import Recording

SHARE = 0.25  # of all experts, whose part in other text is reported: the demo's slots


@dataclass
class HotExpertsConfig:
    """Options of `python -m experiments.hot_experts`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    recording: str = MISSING
    output: str | None = None
    split: str = MISSING


def main() -> None:
    ConfigStore.instance().store(name="hot_experts_schema", node=HotExpertsConfig)
    launch.run("hot_experts", measure)


def measure(cfg: DictConfig, folder: Path) -> None:
    """Write the table of `cfg.model` to `cfg.output`, and how it came about to `folder`."""
    recording = Recording(repository_path(cfg.recording))
    model, _ = load_model_view(cfg)
    recording.check_model(model)
    recording.split(cfg.split)  # an unknown or unfinished one is an error
    per_split = {
        split: token_counts(map(recording.trace, recording.split(split)), model.n_layers, model.n_experts)
        for split in sorted({document.split for document in recording.documents})
    }
    counts = per_split[cfg.split]
    measured: dict[str, Any] = {
        "command": "python -m experiments.hot_experts",
        "split": cfg.split,
        "tokens": int(counts[0].sum()) // model.top_k,
        "experts_never_used": int((counts == 0).sum()),
        "coverage": {split: coverage(counts, found) for split, found in per_split.items()},
    }
    output = repository_path(cfg.output) if cfg.output else folder / "hot_experts.safetensors"
    save(output, counts, model, measured)
    about = {"config": OmegaConf.to_container(cfg, resolve=True), "provenance": provenance(0), **measured}
    write_json(folder / "hot_experts.json", about)
    found = ", ".join(f"{split} {share:.1%}" for split, share in measured["coverage"].items())
    launch.say(
        f"{measured['tokens']} tokens counted; the hottest {SHARE:.0%} of the experts serve, of all activations: {found}; {output}"
    )


def coverage(counts: Tensor, found: Tensor) -> float:
    """Share of the activations `found` [L, E] that go to the hottest `SHARE` of the experts by `counts` [L, E]."""
    hot = torch.tensor(hottest_first(counts)[: int(SHARE * counts.numel())])
    return float(found[hot[:, 0], hot[:, 1]].sum() / found.sum())


if __name__ == "__main__":
    main()
