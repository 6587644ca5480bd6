"""Tensors of a Hugging Face checkpoint folder, read one at a time: one safetensors file, or shards with an index.

Tensors are read with plain reads instead of a memory mapping: a mapping counts against a memory limit, and reading a
shard that was cut short under a mapping kills the process (SIGBUS) instead of raising an error.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from prefetch.errors import CheckpointError, UnsupportedModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BYTES = {"U8": torch.uint8}
DTYPES = FLOATS | BYTES
READABLE_QUANTISATION = "mxfp4"  # of the experts alone, as gpt-oss ships (prefetch/expert_tensors.py)
LANGUAGE_PART = "model.language_model."  # how multimodal checkpoints begin the names of what is else in "model."
SAMPLE_BYTES = 4096
N_SAMPLES = 64  # per shard, for the fingerprint


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies."""

    shard: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int  # bytes from the start of the shard
    n_bytes: int


@dataclass(frozen=True)
class _Shard:
    """One safetensors file: an 8-byte length, a JSON header of that length, then the tensors' data."""

    path: Path
    header: bytes
    data_start: int
    size: int
    entries: dict[str, _Entry]


class Checkpoint:
    """A checkpoint folder whose headers have been read and checked. It holds no file open and no weights.

    Args:
        folder: holds config.json and model.safetensors, or model.safetensors.index.json with its shards.

    Attributes:
        config: of the language model; a multimodal checkpoint's other parts are left aside. Tensors have the names that a
            checkpoint of the language model alone would give them.

    Raises:
        CheckpointError: a file is missing, damaged or shorter than its header says.
        UnsupportedModelError: transformers does not know the architecture.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self._shards = [_read_shard(path) for path in _shard_paths(self.folder)]
        named = [(name, entry) for shard in self._shards for name, entry in shard.entries.items()]
        self._entries = {name.replace(LANGUAGE_PART, "model.", 1): entry for name, entry in named}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def read(
        self, name: str, shape: tuple[int, ...], index: int | None = None, *, dtypes: Mapping[str, torch.dtype] = FLOATS
    ) -> Tensor:
        """A tensor of the checkpoint, in its stored dtype.

        Args:
            name: as in the checkpoint.
            shape: what the tensor's shape must be.
            index: read only this entry of the first dimension; the result then has shape `shape[1:]`.
            dtypes: what it may be stored as, `FLOATS` or `BYTES`.

        Raises:
            CheckpointError: the tensor is absent, has another shape or dtype, or cannot be read.
        """
        entry = self._entry(name, shape, dtypes)
        if index is None:
            return _read_tensor(entry, entry.start, shape)
        stride = entry.n_bytes // shape[0]
        return _read_tensor(entry, entry.start + index * stride, shape[1:])

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that identify the checkpoint's content wherever it lies.

        A hash over config.json and, per shard, its name, size, header (tensor names, shapes, dtypes) and 64 evenly
        spaced blocks of 4 KiB of its weights. Hashing everything would read the whole model at every start. The samples
        miss an edit confined to a few tensors; `modified_ns` catches that.
        """
        with _reading(self.folder / "config.json") as path:
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16)
        for shard in self._shards:
            digest.update(f"{shard.path.name} {shard.size} ".encode() + shard.header)
            _hash_samples(shard, digest)
        return digest.hexdigest()

    @property
    def modified_ns(self) -> int:
        """When the newest shard was written, ns since the epoch. Unlike the fingerprint, a copy changes it."""
        with _reading(self.folder):
            return max(shard.path.stat().st_mtime_ns for shard in self._shards)

    def _entry(self, name: str, shape: tuple[int, ...], dtypes: Mapping[str, torch.dtype]) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder}: no shard holds the tensor {name}")
        if entry.shape != shape:
            shapes = f"has shape {list(entry.shape)}; config.json asks for {list(shape)}"
            raise CheckpointError(f"{entry.shard}: {name} {shapes}")
        if entry.dtype not in dtypes:
            raise CheckpointError(f"{entry.shard}: {name} has dtype {entry.dtype}, not one of {', '.join(dtypes)}")
        return entry


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of the language model in `folder`.

    Raises:
        CheckpointError, UnsupportedModelError: as `Checkpoint` does.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a checkpoint holds config.json and {SINGLE_FILE} or {INDEX_FILE}")
    _read_json(path)
    try:
        config = AutoConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise CheckpointError(f"{path}: {_one_line(error)}") from error
    except (ValueError, OSError) as error:
        raise UnsupportedModelError(f"{path}: {_one_line(error)}") from error
    if quantisation := getattr(config, "quantization_config", None):
        if quantisation["quant_method"] != READABLE_QUANTISATION:
            raise UnsupportedModelError(
                f"{path}: its weights are quantised ({quantisation['quant_method']}), and only float weights and experts in "
                f"{READABLE_QUANTISATION} can be read: convert the checkpoint to bfloat16, and quantise experts with "
                "model.expert_format"
            )
        del config.quantization_config  # transformers shall load the rest as the plain weights that they are
    return config.get_text_config(decoder=True)


def _shard_paths(folder: Path) -> list[Path]:
    """The checkpoint's files in name order; a single file goes before an index, as in transformers."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors can be read")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: it has no 'weight_map' from tensor names to shards")
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"{index} names {len(names)} shards, {len(absent)} are missing: {', '.join(absent[:3])}")
    return [folder / name for name in names]


def _read_shard(path: Path) -> _Shard:
    with _reading(path), open(path, "rb") as file:
        size = path.stat().st_size
        prefix = file.read(8)
        data_start = 8 + int.from_bytes(prefix, "little")
        if len(prefix) < 8 or data_start > size:
            raise CheckpointError(f"{path}: {_not_safetensors(prefix, size)}")
        header = file.read(data_start - 8)
    try:
        entries = _entries(path, header, data_start)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({_one_line(error)}); fetch the file again") from error
    expected = max((entry.start + entry.n_bytes for entry in entries.values()), default=data_start)
    if size != expected:
        raise CheckpointError(f"{path}: it has {size} bytes, its header says {expected}; fetch the file again")
    return _Shard(path, header, data_start, size, entries)


def _entries(path: Path, header: bytes, data_start: int) -> dict[str, _Entry]:
    entries = {}
    for name, facts in json.loads(header).items():
        if name == "__metadata__":
            continue
        start, end = facts["data_offsets"]
        entries[name] = _Entry(path, facts["dtype"], tuple(facts["shape"]), data_start + start, end - start)
        dtype = DTYPES.get(facts["dtype"])
        if dtype is not None and end - start != math.prod(facts["shape"]) * dtype.itemsize:
            raise ValueError(f"{name} of shape {facts['shape']} has {end - start} bytes")
    return entries


def _read_tensor(entry: _Entry, start: int, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=DTYPES[entry.dtype])
    rest = tensor.view(-1).view(torch.uint8).numpy().data
    with _reading(entry.shard), open(entry.shard, "rb", buffering=0) as file:
        file.seek(start)
        while len(rest):
            n_read = file.readinto(rest)
            if not n_read:
                raise CheckpointError(f"{entry.shard}: it ends at byte {file.tell()}; it was cut short while in use")
            rest = rest[n_read:]
    return tensor


def _hash_samples(shard: _Shard, digest: hashlib.blake2b) -> None:
    last = max(shard.data_start, shard.size - SAMPLE_BYTES)
    with _reading(shard.path), open(shard.path, "rb") as file:
        for i in range(N_SAMPLES):
            file.seek(shard.data_start + (last - shard.data_start) * i // (N_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))


def _read_json(path: Path) -> dict:
    try:
        with _reading(path):
            content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Turns what the system says when `path` cannot be read into a CheckpointError."""
    try:
        yield path
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _not_safetensors(prefix: bytes, size: int) -> str:
    if prefix == b"version ":
        return "it is a Git LFS pointer, not the weights; run `git lfs pull`"
    return f"it is not a safetensors file, or cut short at {size} bytes; fetch it again"


def _one_line(error: Exception) -> str:
    """Only the sentences that say what is wrong: transformers adds paragraphs of advice."""
    return " ".join(str(error).split("\n\n")[0].split())
