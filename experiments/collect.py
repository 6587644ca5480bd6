"""Record what the routers choose over a workload, and if asked what they saw: the data that predictors learn from.

    python -m experiments.collect workload.n_prompts=24 workload.new_tokens=256
    python -m experiments.collect collect.hidden_states=true collect.shard_rows=4096

Writes `trace.safetensors` (see `prefetch/trace.py`) and, with `hidden_states`, shards `hidden-00000.safetensors`, ... of at most
`shard_rows` tokens each: `hidden` and `residual` [rows, L, H] in the model's dtype, rows in the order of the trace's rows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from experiments import launch
from experiments.arm import runtime
from experiments.atomic import replacing
from experiments.config import repository_path, validate
from experiments.decode import workload_batches
from experiments.generation import generate_all
from experiments.progress import progress_bar
from predictors.base import LayerView, Prediction, Predictor
from prefetch.errors import ConfigError
from prefetch.model import attach, load_offloaded
from prefetch.store import ExpertStore


class HiddenStateWriter(Predictor):
    """Sees what predictors see, predicts nothing, and writes it to shards: memory is bounded by one shard."""

    needs_residual = True

    def __init__(self, folder: Path, shard_rows: int):
        self.folder, self.shard_rows = folder, shard_rows
        self.n_shards, self.n_rows = 0, 0
        self.pass_so_far: list[tuple[Tensor, Tensor]] = []  # per layer of the forward pass under way
        self.rows: list[tuple[Tensor, Tensor]] = []  # finished passes, [T, L, H] each

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Keep the layer's view; at the last layer the pass is complete."""
        assert seen.residual is not None
        self.pass_so_far.append((seen.hidden.clone(), seen.residual.clone()))
        if seen.layer == self.model.n_layers - 1:
            hidden, residual = (torch.stack(layers, dim=1) for layers in zip(*self.pass_so_far, strict=True))
            self.pass_so_far.clear()
            for first in range(0, len(hidden), self.shard_rows):
                part = slice(first, first + self.shard_rows)
                self._add(hidden[part], residual[part])
        return []

    def _add(self, hidden: Tensor, residual: Tensor) -> None:
        if self.n_rows + len(hidden) > self.shard_rows:
            self.flush()
        self.rows.append((hidden, residual))
        self.n_rows += len(hidden)

    def flush(self) -> None:
        """Write what is held as the next shard."""
        if not self.rows:
            return
        hidden, residual = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        with replacing(self.folder / f"hidden-{self.n_shards:05d}.safetensors") as aside:
            save_file({"hidden": hidden, "residual": residual}, aside)
        self.n_shards += 1
        self.rows, self.n_rows = [], 0


def main() -> None:
    launch.run("collect", collect)


def collect(cfg: DictConfig, folder: Path) -> None:
    """Decode the workload once and write its trace, and hidden states where asked, to `folder`."""
    validate(cfg)
    if cfg.collect.shard_rows < 1:
        raise ConfigError(f"collect.shard_rows={cfg.collect.shard_rows}: it must be at least 1")
    torch.set_num_threads(cfg.backend.n_threads)
    model_folder, dtype = repository_path(cfg.model.path), getattr(torch, cfg.model.dtype)
    store = ExpertStore.open(model_folder, dtype, repository_path(cfg.model.pack_dir))
    batches = workload_batches(cfg, model_folder)
    model = load_offloaded(model_folder, dtype)
    with runtime(cfg, store, None) as served:
        writer = HiddenStateWriter(folder, cfg.collect.shard_rows)
        if cfg.collect.hidden_states:
            served.predictor = writer
        with attach(model, served), progress_bar("collecting", len(batches)) as advance:
            for _ in generate_all(model, batches, cfg.workload, cfg.seed):
                advance()
        if cfg.collect.hidden_states and served.predictor is not writer:
            raise ConfigError("writing hidden states failed, as the warning above says: is the disk full?")
        writer.flush()
        trace = served.recorder.trace({"model": model_folder.name, "fingerprint": store.fingerprint})
        trace.save(folder / "trace.safetensors")
    Console(stderr=True).print(f"{trace.n_tokens} tokens, {writer.n_shards} shards of hidden states: {folder}")


if __name__ == "__main__":
    main()
