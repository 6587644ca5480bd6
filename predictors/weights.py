"""The file a trained predictor is kept in: safetensors, with everything in its header that must fit where it is loaded."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from predictors.base import ModelView
from prefetch.errors import PredictorError

FORMAT = "gatecast predictor, version 1"
CHECKOUT = Path(__file__).resolve().parents[1]


def located(name: str) -> Path:
    """As given, else relative to the checkout, as configurations name files."""
    path = Path(name)
    return path if path.is_absolute() or path.exists() else CHECKOUT / path


def model_identity(model: ModelView) -> dict[str, Any]:
    """What must be the same of the model where weights are made and where they are used."""
    return {
        "MoE layers": model.n_layers,
        "experts": model.n_experts,
        "top_k": model.top_k,
        "hidden_size": model.hidden_size,
        "routers": model.fingerprint,
    }


def write(path: Path, tensors: Mapping[str, Tensor], identity: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    """Write `tensors` to `path`, complete or not at all.

    Args:
        identity: what `read` compares, item by item; plain JSON values.
        trained: how the weights came about (command, versions, figures); plain JSON values, for people.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "identity": json.dumps(identity),
        "trained": json.dumps(trained),
        "crc32": f"{_checksum(plain):08x}",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(plain, aside, header)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read(path: Path, identity: Mapping[str, Any], made_by: str) -> dict[str, Tensor]:
    """The tensors in `path`, a file that the command `made_by` writes.

    Raises:
        PredictorError: the file is missing, truncated, damaged, of another format, holds numbers that are not finite, or was
            trained for something else than `identity` says; the message names the first item that differs.
    """
    if not path.is_file():
        raise PredictorError(f"{path}: no such predictor weights; make them with {made_by}")
    header, tensors = _read_all(path)
    if header.get("format") != FORMAT:
        raise PredictorError(f"{path}: its format is {header.get('format')!r}; this version reads {FORMAT!r}")
    if header.get("crc32") != f"{_checksum(tensors):08x}":
        raise PredictorError(f"{path}: the weights are damaged (their checksum differs); train them again or restore the file")
    _check_identity(path, json.loads(header["identity"]), identity)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise PredictorError(f"{path}: {name} holds numbers that are not finite; train the weights again")
    return tensors


def training_record(path: Path) -> dict[str, Any]:
    """How the weights in `path` came about.

    Raises:
        PredictorError: as `read` does for a file that is missing or damaged.
    """
    header, _ = _read_all(path)
    record: dict[str, Any] = json.loads(header.get("trained", "{}"))
    return record


def check_shapes(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise PredictorError, naming the tensor, unless both hold the same names with the same shapes."""
    for name in expected.keys() | found.keys():
        if name not in found or name not in expected:
            raise PredictorError(f"{path}: {'lacks' if name not in found else 'has an unknown tensor'} {name!r}")
        if found[name].shape != expected[name].shape:
            raise PredictorError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, this predictor expects {tuple(expected[name].shape)}"
            )


def _read_all(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError) as error:
        raise PredictorError(f"{path}: truncated or damaged ({error}); train the weights again or restore the file") from error


def _check_identity(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for item, value in expected.items():
        if item not in found:
            raise PredictorError(f"{path}: trained without {item}, here it is {value!r}; train the weights again")
        if item == "routers" and found[item] != value:
            raise PredictorError(f"{path}: trained for another model: the weights of its routers differ; train it for this one")
        if found[item] != value:
            raise PredictorError(f"{path}: trained for {item}={found[item]!r}, here it is {value!r}")


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over names and bytes, in order of the names."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), crc))
    return crc
