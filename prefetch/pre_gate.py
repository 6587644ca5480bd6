"""Pre-gates that a checkpoint ships: one trained gate per MoE layer that selects experts for the layer `level` further on.

The format, beside the model's own tensors and options:
    model.layers.{N}.mlp.pre_gate.weight  [E, H] float, for every MoE layer N that has a layer to select for, N the decoder
        layer's number (`Family.pre_gate` names it for other families); applied to the router input of layer N, without bias
    config.json: "pre_gate_level": 1, the number of MoE layers ahead; "pre_gate_mode": "hint" | "route"; in its "text_config" where
        it has one

`hint`: the model's own routers decide, the heads only say early what they will say. `route`: the heads decide, and the routers
of the layers they select for are not used, as in Pre-gated MoE (arXiv 2308.12066); such a model is another model than the one
it was made from, so the mode is lossy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefetch.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from prefetch.errors import CheckpointError
from prefetch.families import family_of, moe_layer_indices, n_experts

LEVEL, MODE = "pre_gate_level", "pre_gate_mode"  # options of config.json
HINT, ROUTE = MODES = ("hint", "route")
SHARD = "pre_gate.safetensors"  # the file that `add_pre_gates` puts the heads in
FIRST_SHARD = "model-00001-of-00001.safetensors"  # what a checkpoint's single file is renamed to, once it has an index


@dataclass(frozen=True)
class PreGates:
    """The heads of one model: head n observes MoE layer n and selects for MoE layer n + `level`."""

    level: int
    mode: str
    heads: tuple[Tensor, ...]  # [E, H] each; n_layers - level of them

    @property
    def route(self) -> bool:
        """The heads decide what is computed: lossy."""
        return self.mode == ROUTE


def read_pre_gates(checkpoint: Checkpoint) -> PreGates | None:
    """What `checkpoint` ships, in its stored dtype; None where it ships nothing.

    Raises:
        CheckpointError: the options or heads are incomplete, do not fit the model or each other, or are not finite.
    """
    config, where = checkpoint.config, checkpoint.folder / "config.json"
    names = _names(config)
    level, mode = getattr(config, LEVEL, None), getattr(config, MODE, None)
    if level is None and mode is None:
        stray = [name for name in names if name in checkpoint]
        if stray:
            raise CheckpointError(f"{where} lacks {LEVEL} and {MODE}, but the checkpoint holds {stray[0]}: say how it is meant")
        return None
    if type(level) is not int or not 1 <= level < len(names):
        raise CheckpointError(f"{where}: {LEVEL} is {level!r}; it must be a whole number from 1 to {len(names) - 1}")
    if mode not in MODES:
        raise CheckpointError(f"{where}: {MODE} is {mode!r}; it must be one of {', '.join(MODES)}")
    stray = [name for name in names[len(names) - level :] if name in checkpoint]
    if stray:
        raise CheckpointError(f"{checkpoint.folder}: {stray[0]} selects for a layer past the last at {LEVEL} {level}")
    shape = (n_experts(config), config.hidden_size)
    heads = tuple(checkpoint.read(name, shape) for name in names[: len(names) - level])
    for name, head in zip(names, heads, strict=False):
        if not bool(head.isfinite().all()):
            raise CheckpointError(f"{checkpoint.folder}: {name} holds numbers that are not finite; train the pre-gates again")
    return PreGates(level, mode, heads)


def add_pre_gates(folder: Path, pre_gates: PreGates) -> None:
    """Add heads and options to the checkpoint in `folder`, in place: for a copy that does not yet bear its final name.

    The heads go into a shard of their own, so that no other weight is written again.

    Raises:
        CheckpointError: the checkpoint is damaged, has pre-gates already, or another number of layers or sizes than the heads.
    """
    checkpoint = Checkpoint(folder)
    if read_pre_gates(checkpoint) is not None:
        raise CheckpointError(f"{folder} has pre-gates already; begin with the checkpoint they were made from")
    index = _index_of(folder)
    names = _names(checkpoint.config)[: len(pre_gates.heads)]
    save_file(
        {name: head.detach().contiguous() for name, head in zip(names, pre_gates.heads, strict=True)},
        folder / SHARD,
        {"format": "pt"},
    )
    index["weight_map"] |= dict.fromkeys(names, SHARD)
    if (folder / SINGLE_FILE).is_file():
        (folder / SINGLE_FILE).rename(folder / FIRST_SHARD)
    _write_json(folder / INDEX_FILE, index)
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config).update({LEVEL: pre_gates.level, MODE: pre_gates.mode})
    _write_json(folder / "config.json", config)
    read_pre_gates(Checkpoint(folder))


def _names(config: Any) -> list[str]:
    """What each MoE layer's head is called, in order."""
    return [family_of(config).pre_gate.format(layer=layer) for layer in moe_layer_indices(config)]


def _index_of(folder: Path) -> dict[str, Any]:
    """The checkpoint's index; for one in a single file, the index it will have once that file is a shard."""
    if not (folder / SINGLE_FILE).is_file():
        found: dict[str, Any] = json.loads((folder / INDEX_FILE).read_text())
        return found
    with safe_open(folder / SINGLE_FILE, framework="pt") as file:
        return {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), FIRST_SHARD)}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
