"""Record what the layers of a model see and what its routers choose, document by document: the data predictors learn from.

    python -m experiments.collect documents=bundled collect.hidden_states=true hydra.run.dir=outputs/recording
    python -m experiments.collect workload.n_prompts=24 workload.new_tokens=256

Writes a recording (see `predictors/recording.py`) and `trace.safetensors`, the routing of all documents for replay. Interrupted,
it goes on where it was when started again with the same folder; memory holds one shard of states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from experiments import launch
from experiments.arm import runtime
from experiments.atomic import replacing, write_json
from experiments.backend import refuse_gpu
from experiments.config import repository_path, validate
from experiments.documents import Document, documents_of
from experiments.expert_store import open_store
from experiments.generation import generate
from experiments.progress import progress_bar
from predictors.base import LayerView, Prediction, Predictor
from predictors.recording import FORMAT, INDEX, PREVIOUS_FINAL, STATES, TRACE, RecordedDocument, Recording, joined, read_index
from prefetch.errors import ConfigError, RecordingError
from prefetch.model import attach, load_offloaded
from prefetch.recorder import Recorder
from prefetch.runtime import OffloadRuntime


class StateWriter(Predictor):
    """Sees what predictors see, predicts nothing, and writes it to shards of the present document's folder."""

    needs_residual = True
    needs_pre_attention = True
    sees_every_call = True

    def __init__(self, shard_rows: int):
        self.shard_rows = shard_rows
        self.pass_so_far: list[LayerView] = []  # the layers of the forward pass under way
        self.last_final: Tensor | None = None  # [B, H], of the document's last token so far
        self.rows: list[dict[str, Tensor]] = []  # finished passes, [T, L, H] each, and [T, H] what has no layers

    def begin(self, folder: Path) -> None:
        """A document begins, whose shards go to `folder`."""
        self.folder, self.n_shards, self.n_rows = folder, 0, 0
        self.last_final = None
        self.pass_so_far.clear()
        self.rows.clear()

    def predict(self, seen: LayerView) -> list[Prediction]:
        """Keep the layer's view, until the pass is complete."""
        self.pass_so_far.append(seen)
        return []

    def after_stack(self, final_hidden: Tensor) -> None:
        """The pass is complete, and `final_hidden` [B, n, H] what the output head reads of it."""
        complete = {name: torch.stack([getattr(view, name) for view in self.pass_so_far], dim=1) for name in STATES}
        self.pass_so_far.clear()
        before = torch.zeros_like(final_hidden[:, 0]) if self.last_final is None else self.last_final
        complete[PREVIOUS_FINAL] = torch.cat([before.unsqueeze(1), final_hidden[:, :-1]], dim=1).flatten(0, 1)
        self.last_final = final_hidden[:, -1]
        for first in range(0, len(complete["hidden"]), self.shard_rows):
            self._add({name: state[first : first + self.shard_rows] for name, state in complete.items()})

    def _add(self, states: dict[str, Tensor]) -> None:
        n_rows = len(states["hidden"])
        if self.n_rows + n_rows > self.shard_rows:
            self.flush()
        self.rows.append(states)
        self.n_rows += n_rows

    def flush(self) -> None:
        """Write what is held as the next shard."""
        if not self.rows:
            return
        with replacing(self.folder / f"states-{self.n_shards:03d}.safetensors") as aside:
            save_file({name: torch.cat([row[name] for row in self.rows]) for name in self.rows[0]}, aside)
        self.n_shards += 1
        self.rows, self.n_rows = [], 0


def main() -> None:
    launch.run("collect", collect)


def collect(cfg: DictConfig, folder: Path) -> None:
    """Run every document that `folder` does not hold yet, and write what its layers saw and chose."""
    validate(cfg)
    if cfg.collect.shard_rows < 1:
        raise ConfigError(f"collect.shard_rows={cfg.collect.shard_rows}: it must be at least 1")
    refuse_gpu(cfg.backend, "experiments.collect")
    torch.set_num_threads(cfg.backend.n_threads)
    model_folder, dtype = repository_path(cfg.model.path), getattr(torch, cfg.model.dtype)
    store = open_store(cfg.model)
    documents = documents_of(cfg, model_folder)
    model = load_offloaded(model_folder, dtype)
    writer = StateWriter(cfg.collect.shard_rows) if cfg.collect.hidden_states else None
    with runtime(cfg, store, None) as served:
        if writer is not None:
            served.predictor = writer
        with attach(model, served), listening(model, writer):
            index = _index(cfg, documents, served.model.fingerprint)
            _continue_or_begin(folder, index)
            _run_all(cfg, model, served, writer, documents, folder)
    recording = Recording(folder)
    trace = joined([recording.trace(document) for document in recording.documents])
    trace.save(folder / TRACE)
    launch.say(f"{len(documents)} documents, {trace.n_tokens} tokens: {folder}")


@contextmanager
def listening(model: PreTrainedModel, writer: StateWriter | None) -> Iterator[None]:
    """Tell `writer` what leaves the stack of layers, for the length of a `with` block."""
    if writer is None:
        yield
        return
    handle = model.get_decoder().register_forward_hook(
        lambda decoder, args, output: writer.after_stack(output.last_hidden_state)
    )
    try:
        yield
    finally:
        handle.remove()


def _run_all(
    cfg: DictConfig,
    model: PreTrainedModel,
    served: OffloadRuntime,
    writer: StateWriter | None,
    documents: list[Document],
    folder: Path,
) -> None:
    with progress_bar("recording", len(documents)) as advance:
        for index, document in enumerate(documents):
            place = folder / RecordedDocument(document.name, document.split, document.source, index).folder_name
            if not (place / TRACE).exists():
                _run(cfg, model, served, writer, document, index, place)
            advance()


def _run(
    cfg: DictConfig,
    model: PreTrainedModel,
    served: OffloadRuntime,
    writer: StateWriter | None,
    document: Document,
    index: int,
    place: Path,
) -> None:
    """One document; its trace is written last, so that a document that has one is complete."""
    served.recorder = Recorder(served.geometry)
    if writer is not None:
        writer.begin(place)
    n_passes = max(1, document.new_tokens)  # the first is the prompt's own
    draws = {"temperature": cfg.workload.temperature, "seed": cfg.seed + index}
    try:
        generate(model, document.token_ids, n_passes, **draws)
        if writer is not None:
            writer.flush()
    except OSError as error:
        raise RecordingError(f"{place}: the states could not be written ({error}); is the disk full?") from error
    place.mkdir(parents=True, exist_ok=True)
    served.recorder.trace({"document": document.name}).save(place / TRACE)


def _index(cfg: DictConfig, documents: list[Document], fingerprint: str) -> dict[str, Any]:
    """What `recording.json` says: all that must be the same for an interrupted recording to go on."""
    tokens = hashlib.blake2b(digest_size=16)
    for document in documents:
        tokens.update(document.token_ids.numpy().tobytes() + document.new_tokens.to_bytes(4, "little"))
    return {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "dtype": cfg.model.dtype,
        "hidden_states": cfg.collect.hidden_states,
        "temperature": cfg.workload.temperature,
        "seed": cfg.seed,
        "tokens": tokens.hexdigest(),
        "documents": [{"name": d.name, "split": d.split, "source": d.source} for d in documents],
    }


def _continue_or_begin(folder: Path, index: dict[str, Any]) -> None:
    found = read_index(folder)
    if found is None:
        write_json(folder / INDEX, index)
        return
    differing = [key for key in index if found.get(key) != index[key]]
    if differing:
        raise RecordingError(
            f"{folder}: holds another recording (other {', '.join(differing)}); choose another hydra.run.dir, or delete it"
        )


if __name__ == "__main__":
    main()
