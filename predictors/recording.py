"""What the layers of a model saw over many documents, on disk: the data that predictors are trained and judged on.

A recording is a folder: `recording.json` lists its documents, and each document has a folder of its own with `states-000.safetensors`,
... (`hidden`, `residual`, `pre_attention` [rows, L, H] and `previous_final` [rows, H], at most `shard_rows` rows each) and
`trace.safetensors`, its routing. The trace is written last: a document without one is not finished. `experiments/collect.py` writes
recordings; those of before `previous_final` was recorded serve every predictor that does without it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from predictors.base import LayerView, ModelView
from prefetch.errors import RecordingError
from prefetch.trace import RoutingTrace

INDEX = "recording.json"
TRACE = "trace.safetensors"
FORMAT = "gatecast recording, version 1"
STATES = ("hidden", "residual", "pre_attention")
PREVIOUS_FINAL = "previous_final"  # zeros for the first token of a document, which has none before it


@dataclass(frozen=True)
class RecordedDocument:
    """One document, that is one sequence (or batch of equal length) that went through the model."""

    name: str
    split: str  # "training", "held_out", "shifted", ...; which are used for what is decided when training
    source: str  # the file or work it is from: documents of one source never fall on both sides of a split
    index: int  # position in the recording

    @property
    def folder_name(self) -> str:
        return f"document-{self.index:05d}"


class Recording:
    """The finished documents of a recording folder.

    Raises:
        RecordingError: there is no recording, or it is damaged, or of another version.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = read_index(folder)
        if index is None:
            raise RecordingError(
                f"{folder}: no {INDEX} in it; record with python -m experiments.collect documents=bundled "
                f"collect.hidden_states=true hydra.run.dir={folder}"
            )
        self.fingerprint: str = index["fingerprint"]
        listed = [RecordedDocument(**d, index=i) for i, d in enumerate(index["documents"])]
        self.documents = [d for d in listed if (folder / d.folder_name / TRACE).is_file()]
        self.n_missing = len(listed) - len(self.documents)

    def split(self, name: str) -> list[RecordedDocument]:
        """The documents of one split.

        Raises:
            RecordingError: there are none, or the recording was interrupted.
        """
        if self.n_missing:
            raise RecordingError(
                f"{self.folder}: {self.n_missing} documents are missing, the recording was interrupted; run the same collect again"
            )
        found = [d for d in self.documents if d.split == name]
        if not found:
            splits = ", ".join(sorted({d.split for d in self.documents}))
            raise RecordingError(f"{self.folder}: no document of split {name!r}; it has {splits}")
        return found

    def check_model(self, model: ModelView) -> None:
        """Raise RecordingError unless `model` is the one that was recorded."""
        if self.fingerprint != model.fingerprint:
            raise RecordingError(f"{self.folder}: recorded from another model (its routers differ); record this one")

    def trace(self, document: RecordedDocument) -> RoutingTrace:
        """The document's routing.

        Raises:
            TraceError: as `RoutingTrace.load`.
        """
        return RoutingTrace.load(self.folder / document.folder_name / TRACE)

    def states(self, document: RecordedDocument) -> dict[str, Tensor]:
        """The document's states by name, [rows, L, H] each in the model's dtype; `previous_final` [rows, H] where it was recorded.

        Raises:
            RecordingError: they were not recorded, or a file is damaged.
        """
        parts = sorted((self.folder / document.folder_name).glob("states-*.safetensors"))
        if not parts:
            raise RecordingError(
                f"{self.folder}: document {document.name!r} has no states; record with collect.hidden_states=true"
            )
        read = [_read_states(part) for part in parts]
        return {name: torch.cat([states[name] for states in read]) for name in read[0]}

    def rows(self, documents: Sequence[RecordedDocument], max_rows: int | None = None) -> list[LayerView]:
        """Per MoE layer one view of all tokens of `documents`, in order: the form in which predictors are trained.

        Args:
            max_rows: documents that would exceed this many tokens in memory are left out.
        """
        columns: list[dict[str, Tensor]] = []
        n_rows = 0
        for document in documents:
            trace = self.trace(document)
            if max_rows is not None and columns and n_rows + trace.n_tokens > max_rows:
                break
            columns.append(self._columns(document, trace))
            n_rows += trace.n_tokens
        whole = {name: torch.cat([c.pop(name) for c in columns]) for name in list(columns[0])}
        return [_view(whole, layer, 0, 0, slice(None)) for layer in range(whole["hidden"].shape[1])]

    def views(self, document: RecordedDocument, sequence: int) -> Iterator[LayerView]:
        """What the runtime showed while the document ran, in order: forward pass by forward pass, layer by layer."""
        trace = self.trace(document)
        columns = self._columns(document, trace)
        known_in_prefill = {name: column for name, column in columns.items() if name != PREVIOUS_FINAL}
        for forward in trace.forwards():
            known = columns if forward.step else known_in_prefill
            for layer in range(trace.n_layers):
                yield _view(known, layer, forward.step, sequence, forward.rows)

    def _columns(self, document: RecordedDocument, trace: RoutingTrace) -> dict[str, Tensor]:
        columns = self.states(document)
        if any(len(state) != trace.n_tokens for state in columns.values()):
            raise RecordingError(
                f"{self.folder}: document {document.name!r}: states and routing differ in length; record it again"
            )
        columns["topk_ids"] = torch.from_numpy(trace.topk_ids.astype(np.int64))
        columns["topk_weights"] = torch.from_numpy(trace.topk_weights)
        columns["token_ids"] = torch.from_numpy(trace.token_ids.astype(np.int64))
        return columns


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """The routing of several documents as one trace, document n as sequence n; guesses are left out."""
    sequences = [np.full(trace.n_tokens, i, np.int32) for i, trace in enumerate(traces)]
    names = ("step", "phase", "token_ids", "topk_ids", "topk_weights")
    arrays: dict[str, Any] = {name: np.concatenate([getattr(trace, name) for trace in traces]) for name in names}
    return dataclasses.replace(traces[0], sequence=np.concatenate(sequences), **arrays, guesses={}, resident={})


def read_index(folder: Path) -> dict[str, Any] | None:
    """What `recording.json` says; None where there is none.

    Raises:
        RecordingError: it is damaged or of another version.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RecordingError(f"{path}: damaged or not readable ({error}); record again into another folder") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise RecordingError(f"{path}: not a recording of this version; record again into another folder")
    return index


def _view(columns: dict[str, Tensor], layer: int, step: int, sequence: int, rows: slice) -> LayerView:
    per_layer = {name: columns[name][rows, layer] for name in (*STATES, "topk_ids", "topk_weights")}
    previous_final = columns[PREVIOUS_FINAL][rows] if PREVIOUS_FINAL in columns else None
    return LayerView(layer, step, sequence, token_ids=columns["token_ids"][rows], previous_final=previous_final, **per_layer)


def _read_states(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = (*STATES, PREVIOUS_FINAL) if PREVIOUS_FINAL in file.keys() else STATES  # noqa: SIM118, no mapping
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise RecordingError(
            f"{path}: the states are truncated or damaged ({error}); delete its folder and collect again"
        ) from error
