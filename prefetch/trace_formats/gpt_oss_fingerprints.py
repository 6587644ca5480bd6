"""Routing of gpt-oss-20b from AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting, its JSON packed into arrays.

`NAME.npz` holds `ids` uint8 [tokens, 24, 4], highest probability first, `probs` float16 of the same shape, and `offsets` int64
[sequences + 1], the rows where sequences begin and end. `NAME.meta.jsonl` beside it has a line a sequence; read are `tokens`, one
string a row, and `repetition`, true where the text runs in a loop.

Only what the model generated was published, so a sequence's first row, the first generated token, stands as its prefill (step 0).
There are no token ids: the different strings of a file are numbered in order of first appearance. Equal strings have equal numbers,
even where they were different tokens (broken pieces of a character all read as one replacement mark); numbers of two files have
nothing to do with each other.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefetch.errors import ConfigError, TraceError
from prefetch.trace import RoutingTrace
from prefetch.trace_formats.base import TraceFormat

N_LAYERS, N_EXPERTS, TOP_K = 24, 32, 4  # of gpt-oss-20b
ARRAYS = ("ids", "probs", "offsets")
METADATA = {
    "model": "gpt-oss-20b",
    "licence": "Apache-2.0; prompts under the licence of their data set (MMLU: MIT)",
    "row_bytes": "13200000",
    "row_bytes_note": "approximate: 13.2 MB an expert in mxfp4",
    "prefill": "not published: step 0 is the first generated token",
    "token_ids": "not published: token strings numbered by first appearance in this file, not comparable between files",
}


class SequenceText(NamedTuple):
    """What a line of the meta file says of one sequence."""

    tokens: list[str]
    loops: bool


@dataclass
class GptOssFingerprints(TraceFormat):
    """Sequences keep their order in the file; those left out leave no gap in the numbers."""

    keep_loops: bool = False  # also sequences whose text runs in a loop: their routing repeats too, which flatters every cache
    max_sequences: int | None = None  # only the first so many; None keeps all

    def __post_init__(self) -> None:
        if self.max_sequences is not None and self.max_sequences < 1:
            raise ConfigError(f"format.max_sequences={self.max_sequences}: it must be at least 1, or null for all")

    def read(self, path: Path) -> RoutingTrace:
        """The routing in `path` (NAME.npz), which needs NAME.meta.jsonl beside it. Raises TraceError."""
        ids, probs, offsets = _arrays(path)
        texts = _texts(path.with_suffix(".meta.jsonl"), np.diff(offsets))
        kept = [n for n, text in enumerate(texts) if text.tokens and (self.keep_loops or not text.loops)][: self.max_sequences]
        if not kept:
            raise TraceError(
                f"{path}: none of its {len(texts)} sequences is left; format.keep_loops=true keeps those that loop"
            )
        lengths = np.diff(offsets)[kept]
        rows = np.concatenate([np.arange(offsets[n], offsets[n + 1]) for n in kept])
        step = np.concatenate([np.arange(length) for length in lengths])
        return RoutingTrace(
            sequence=np.repeat(np.arange(len(kept), dtype=np.int32), lengths),
            step=step.astype(np.int32),
            phase=(step > 0).astype(np.uint8),
            token_ids=_numbered([token for text in texts for token in text.tokens])[rows],
            topk_ids=ids[rows].astype(np.uint16),
            topk_weights=probs[rows].astype(np.float32),
            n_experts=N_EXPERTS,
            metadata=METADATA | self._provenance(path, len(kept), texts),
        )

    def _provenance(self, path: Path, n_kept: int, texts: Sequence[SequenceText]) -> dict[str, str]:
        n_loops = sum(text.loops for text in texts)
        return {
            "source": f"https://github.com/AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting, {path.name}",
            "sequences": f"{n_kept} of {len(texts)}; {n_loops} loop and are {'kept' if self.keep_loops else 'left out'}",
        }


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids uint8 [N, 24, 4], probs float16 [N, 24, 4], offsets int64 [S + 1], checked."""
    try:
        with np.load(path) as file:
            ids, probs, offsets = (file[name] for name in ARRAYS)
    except OSError as error:
        raise TraceError(f"{path}: not readable ({error})") from error
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # whatever numpy makes of it
        raise TraceError(f"{path}: not an npz file with the arrays {', '.join(ARRAYS)}, or truncated") from error
    problem = _shape_problem(ids, probs, offsets) or _value_problem(ids, probs, offsets)
    if problem:
        raise TraceError(f"{path}: {problem}")
    return ids, probs, offsets


def _shape_problem(ids: np.ndarray, probs: np.ndarray, offsets: np.ndarray) -> str | None:
    routed = (*ids.shape[:1], N_LAYERS, TOP_K)
    for name, array, dtype, shape in (
        ("ids", ids, np.uint8, routed),
        ("probs", probs, np.float16, routed),
        ("offsets", offsets, np.int64, (offsets.size,)),
    ):
        if array.dtype != dtype or array.shape != shape:
            return f"{name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}"
    return None


def _value_problem(ids: np.ndarray, probs: np.ndarray, offsets: np.ndarray) -> str | None:
    if (ids >= N_EXPERTS).any():
        return f"ids names expert {ids.max()}, but gpt-oss-20b has {N_EXPERTS} a layer"
    if not np.isfinite(probs).all():
        return "probs are not finite"
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
        return f"offsets must rise from 0 to the number of rows, {len(ids)}"
    return None


def _texts(path: Path, lengths: np.ndarray) -> list[SequenceText]:
    """What the meta file says of sequences of `lengths` [S] rows."""
    try:
        lines = path.read_bytes().splitlines()  # of bytes: text would also be split at the line separators within its strings
    except OSError as error:
        raise TraceError(f"{path}: it must lie beside the npz file and be readable ({error})") from error
    if len(lines) != len(lengths):
        raise TraceError(f"{path}: it has {len(lines)} lines, expected one for each of the {len(lengths)} sequences")
    return [
        _text(f"{path}, line {n}", line, int(length)) for n, (line, length) in enumerate(zip(lines, lengths, strict=True), 1)
    ]


def _text(where: str, line: bytes, length: int) -> SequenceText:
    try:
        content: Any = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{where}: not JSON, or truncated ({error})") from error
    tokens, loops = (content.get(name) if isinstance(content, dict) else None for name in ("tokens", "repetition"))
    if not isinstance(loops, bool):
        raise TraceError(f"{where}: repetition must be true or false")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise TraceError(f"{where}: tokens must be a list of strings")
    if len(tokens) != length:
        raise TraceError(f"{where}: it has {len(tokens)} tokens, but the npz file {length} rows for this sequence")
    return SequenceText(tokens, loops)


def _numbered(tokens: Sequence[str]) -> np.ndarray:
    """int32 [N]: the strings' numbers, in order of first appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(token, len(numbers)) for token in tokens], dtype=np.int32)
